"""``alignlab loop``: rounds of sample, score, pair, train: a policy learns from preferences among its own answers.

Every round has a folder with its stages (:mod:`alignlab.stages`): ``samples``, ``train``, ``evaluate``.  How a round
asks and scores stands in :mod:`alignlab.measuring.asking`.  The rounds' settings are the keys of ``train`` and a few of
the verb's own (:class:`Options`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig, SourceConfig
from alignlab.configuration import names
from alignlab.data.sources import holds_out
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError, DataError
from alignlab.measuring.asking import Asking, Preferences, Ratings, RoundOptions
from alignlab.measuring.report import curves_svg
from alignlab.request import Request, emit
from alignlab.runs.job import make_objective, needs_of
from alignlab.stages import Stage, run_stages, train
from alignlab.types import Unit
from alignlab.verbs.options import own_options

CHOICES = {"policy_init": ("previous", "initial"), "reference": ("round", "initial")}


@dataclass
class Options(RoundOptions):
    """The verb's own settings."""

    rounds: int = 3
    policy_init: str = "previous"
    """Where a round's training starts: the policy of the round before (previous), or the first one (initial)."""
    reference: str = "round"
    """Its reference: the policy it starts from (round), or the first one (initial)."""
    data_window: int = 1
    """Rounds whose rows it trains on, the newest ones; 0: all so far."""


def run(request: Request) -> int:
    """Run what is not done yet; ``loop.json`` and ``curve.svg`` in the loop's folder have the figures by round."""
    options, config = own_options(request, Options), request.config
    objective = make_objective(config)
    _check(options, config, objective)
    asking = (Ratings if _conditioned(objective) else Preferences)(config, options, needs_of(objective))
    folder = names.beside_runs(
        config, "loops", lambda: {"numbers": names.number_keys(config), "options": vars(options)}
    )
    print(f"loop     {folder.name} -> {folder}")
    own = " and the row's own" if options.own_answer else ""
    print(f"rounds   {options.rounds} of {options.prompts} prompts x {options.samples} answers{own}, scored by "
          f"{asking.judges}; policy_init {options.policy_init}, reference {options.reference}, data_window "
          f"{options.data_window or 'all'}")  # fmt: skip
    if not holds_out(config.data):
        print("warning  no rows are held out (data.eval_path, data.eval_fraction): figures are of training prompts")
    stages = list(_stages(request, options, asking, folder))

    def say(name: str, new: bool, seconds: float) -> None:
        print(f"stage    {name:<20} {f'{seconds:.0f} s' if new else 'done before'}", flush=True)

    results = run_stages(folder, stages, say)
    table = [_line(results, number) for number in range(options.rounds + 1)]
    for row in table:
        print("  ".join(f"{name} {_text(value)}" for name, value in row.items()))
    write_atomic(folder / "loop.json", json.dumps({"rounds": table}, indent=1) + "\n")
    measured = [name for name, value in table[-1].items() if isinstance(value, float)]
    series = {name: [(row["round"], row[name]) for row in table if name in row] for name in measured}
    known = (options.measure, "score", "sampled", "control", "control/match")
    first = [name for name in known if name in series]
    panels = [[name] for name in (*first, *(name for name in series if name not in first))]
    write_atomic(folder / "curve.svg", curves_svg(series, panels, over="round"))
    last = f"round-{options.rounds}"
    emit(request, {
        "path": str(folder), "rounds": table, "before": results["round-0/evaluate"],
        "after": results[f"{last}/evaluate"], "model": results[f"{last}/train"]["model"],
    })  # fmt: skip
    return 0


def _check(options: Options, config: RootConfig, objective: Any) -> None:
    problems = [
        f"{key}={getattr(options, key)}: known are {', '.join(known)}"
        for key, known in CHOICES.items()
        if getattr(options, key) not in known
    ]
    for key, least in (("rounds", 1), ("prompts", 1), ("samples", 2), ("held_out", 1), ("data_window", 0)):
        if getattr(options, key) < least:
            problems.append(f"{key}={getattr(options, key)}: at least {least}")
    if options.temperature <= 0:
        problems.append(f"temperature={options.temperature}: answers would all be the same; it must be above 0")
    if objective.head != "lm" or not (objective.example is Unit.PAIR or objective.mismatched):
        problems.append(f"objective={objective.name} learns no preferences; take dpo, kto or cpo")
    elif _conditioned(objective):
        for key in ("scorer", "measure", "threshold"):
            if getattr(options, key) != getattr(RoundOptions, key):
                problems.append(
                    f"{key}={getattr(options, key)}: is of one score; for objective=cpo answers are rated in several "
                    "dimensions, by the verifier and score=[NAME=SCORER, ...]"
                )
    elif options.score:
        problems.append(f"score: is for objective=cpo; objective={objective.name} has one scorer=")
    if config.reference.name_or_path is not None:
        problems.append("reference.name_or_path: the loop chooses the reference; say reference=round or initial")
    if problems:
        raise ConfigError("\n".join(f"loop: {problem}" for problem in problems))


def _conditioned(objective: Any) -> bool:
    """Whether answers are asked for under conditions."""
    return getattr(objective, "stage", None) == "cpo"


# ---------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------


def _stages(request: Request, options: Options, asking: Asking, folder: Path) -> Iterator[Stage]:
    config: RootConfig = request.config
    initial = config.model.name_or_path
    policies = [initial]  # by round; a run's place is known before it is there
    said = names.number_keys(config) | asking.identity()
    yield _evaluation(asking, 0, initial, said)
    for number in range(1, options.rounds + 1):
        own = folder / f"round-{number}"
        yield _sampling(asking, number, policies[-1])
        start = policies[-1] if options.policy_init == "previous" else initial
        first = 1 if options.data_window == 0 else max(1, number - options.data_window + 1)
        rows = [str(folder / f"round-{n}" / "samples" / "rows.jsonl") for n in range(first, number + 1)]
        trained = replace(
            config,
            model=replace(config.model, name_or_path=start, revision=None),
            data=asking.data(_on(config, rows)),
            reference=replace(config.reference, name_or_path=None if options.reference == "round" else initial),
            eval=replace(config.eval, generate=0),
            output_dir=str(own / "train"),
            run=replace(config.run, name="run"),
        )
        yield Stage(
            f"round-{number}/train",
            {**said, "policy_init": start, "reference": trained.reference.name_or_path or start, "rows": rows},
            lambda place, trained=trained: train(trained, request.provenance, place),  # type: ignore[misc]
        )
        policies.append(str(own / "train" / "run" / "model"))
        yield _evaluation(asking, number, policies[-1], said)


def _on(config: RootConfig, rows: list[str]) -> Any:
    """The data section for rows the loop has made: nothing of the original rows' shape applies to them."""
    data = replace(
        config.data, eval_path=None, eval_fraction=0.0, format="auto", columns={}, options={}, group_by=None, rating=[],
        leaks="keep",
    )  # fmt: skip
    if len(rows) == 1:
        return replace(data, path=rows[0], sources=[])
    return replace(data, path=None, sources=[SourceConfig(path=path) for path in rows])


def _sampling(asking: Asking, number: int, policy: str) -> Stage:
    def work(place: Path) -> dict[str, Any]:
        made = asking.sampled(policy, number)
        if not made.rows:
            why = ", ".join(f"{reason} {count}" for reason, count in made.account.dropped.items())
            raise DataError(f"round {number}: no prompt gave a row ({why}); raise samples or temperature")
        write_atomic(place / "samples.jsonl", _lines(made.samples))
        write_atomic(place / "rows.jsonl", _lines(made.rows))
        return made.account.as_json() | {"measures": made.measures}

    return Stage(f"round-{number}/samples", {"policy": policy, **asking.inputs()}, work)


def _evaluation(asking: Asking, number: int, policy: str, said: dict[str, Any]) -> Stage:
    inputs = {"policy": policy, "held_out": asking.options.held_out, **asking.generation(), **said}
    return Stage(f"round-{number}/evaluate", inputs, lambda place: asking.measured(policy, number))


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _line(results: dict[str, dict[str, Any]], number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"round": number}
    if number:
        made = results[f"round-{number}/samples"]
        row |= {"rows_from": made["kept"], "dropped": made["dropped"]}
        row |= {"sampled": made["mean_score"]} if "mean_score" in made else {}
        if "mean_score" not in made or "score" in results[f"round-{number}/evaluate"]:
            # Ratings are no one score, and another scorer's opinion stands beside the verifier's.
            row |= {f"sampled_{name}": value for name, value in made["measures"].items()}
        row |= {"train_steps": results[f"round-{number}/train"]["steps"]}
    measures = results[f"round-{number}/evaluate"]
    return row | {name: value for name, value in measures.items() if name != "prompts"}


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
