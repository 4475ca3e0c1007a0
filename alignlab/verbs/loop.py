"""``alignlab loop``: rounds of sample, score, pair, train: a policy learns from preferences among its own answers.

Every round has a folder with its stages (:mod:`alignlab.stages`): ``samples``, ``train``, ``evaluate``.  The rounds'
settings are the keys of ``train`` and a few of the verb's own (:class:`Options`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignlab import dist
from alignlab.cli import Request, emit
from alignlab.config import RootConfig, SourceConfig
from alignlab.configuration import names, schema
from alignlab.data.plan import permutation
from alignlab.data.prepare import Needs
from alignlab.errors import ConfigError, DataError
from alignlab.measuring.report import curves_svg
from alignlab.measuring.rounds import Scored, preference_rows
from alignlab.measuring.sampling import Sampler
from alignlab.measuring.scorers import VERIFIER, TextScorer, make_scorer, means
from alignlab.measuring.verification import Answer, Prompt, measures_of, prompts_of, summary
from alignlab.runfolder import write_atomic
from alignlab.runs.job import make_objective, needs_of
from alignlab.stages import Stage, run_stages, train
from alignlab.types import Unit
from alignlab.verbs.options import own_options

CHOICES = {"policy_init": ("previous", "initial"), "reference": ("round", "initial")}


@dataclass
class Options:
    """The verb's own settings."""

    rounds: int = 3
    prompts: int = 256
    """Training prompts of a round; the next round takes the next ones, from the start again when all are used."""
    samples: int = 8
    """Answers to each prompt."""
    temperature: float = 1.0
    scorer: str = VERIFIER
    """Who scores the answers: verifier, or a reward model (a run, a folder, a hub name)."""
    measure: str = "correct"
    """The verifier's measure that is the score where a verifier scores; with a reward model it is shown beside."""
    own_answer: bool = False
    """The row's own answer is scored too, and may be a prompt's best or worst one."""
    threshold: float = 0.0
    """Best and worst answer must be more than this apart."""
    policy_init: str = "previous"
    """Where a round's training starts: the policy of the round before (previous), or the first one (initial)."""
    reference: str = "round"
    """Its reference: the policy it starts from (round), or the first one (initial)."""
    data_window: int = 1
    """Rounds whose rows it trains on, the newest ones; 0: all so far."""
    held_out: int = 200
    """Held-out prompts that are answered (greedy) after each round."""


def run(request: Request) -> int:
    """Run what is not done yet; ``loop.json`` and ``curve.svg`` in the loop's folder have the figures by round."""
    options, config = own_options(request, Options), request.config
    objective = make_objective(config)
    _check(options, config, objective)
    scorer = make_scorer(options.scorer, config, options.measure)
    folder = names.beside_runs(
        config, "loops", lambda: {"numbers": names.number_keys(config), "options": vars(options)}
    )
    form = "labels" if objective.example is Unit.SEQUENCE else "pairs"
    print(f"loop     {folder.name} -> {folder}")
    judge = f"'{options.measure}'" if scorer.is_verifier else options.scorer
    own = " and the row's own" if options.own_answer else ""
    print(f"rounds   {options.rounds} of {options.prompts} prompts x {options.samples} answers{own}, scored by "
          f"{judge}; policy_init {options.policy_init}, reference {options.reference}, data_window "
          f"{options.data_window or 'all'}")  # fmt: skip
    stages = list(_stages(request, options, scorer, form, folder))

    def say(name: str, new: bool, seconds: float) -> None:
        print(f"stage    {name:<20} {f'{seconds:.0f} s' if new else 'done before'}", flush=True)

    results = run_stages(folder, stages, say)
    table = [_line(results, number) for number in range(options.rounds + 1)]
    for row in table:
        print("  ".join(f"{name} {_text(value)}" for name, value in row.items()))
    write_atomic(folder / "loop.json", json.dumps({"rounds": table}, indent=1) + "\n")
    measured = [name for name, value in table[-1].items() if isinstance(value, float)]
    series = {name: [(row["round"], row[name]) for row in table if name in row] for name in measured}
    first = [name for name in (options.measure, "score", "sampled") if name in series]
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
        problems.append(f"objective={objective.name} learns no preferences; take dpo or kto")
    if getattr(objective, "stage", None):
        problems.append(f"objective={objective.name}: conditioned rows are not made by the loop yet; take dpo or kto")
    if config.reference.name_or_path is not None:
        problems.append("reference.name_or_path: the loop chooses the reference; say reference=round or initial")
    if problems:
        raise ConfigError("\n".join(f"loop: {problem}" for problem in problems))


# ---------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------


def _stages(request: Request, options: Options, scorer: TextScorer, form: str, folder: Path) -> Iterator[Stage]:
    config: RootConfig = request.config
    initial = config.model.name_or_path
    policies = [initial]  # by round; a run's place is known before it is there
    said = names.number_keys(config) | {"scorer": scorer.identity}
    yield _evaluation(config, options, scorer, 0, initial, said)
    for number in range(1, options.rounds + 1):
        own = folder / f"round-{number}"
        yield _sampling(config, options, scorer, number, policies[-1], form, own)
        start = policies[-1] if options.policy_init == "previous" else initial
        first = 1 if options.data_window == 0 else max(1, number - options.data_window + 1)
        rows = [str(folder / f"round-{n}" / "samples" / "rows.jsonl") for n in range(first, number + 1)]
        trained = replace(
            config,
            model=replace(config.model, name_or_path=start, revision=None),
            data=_on(config, rows),
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
        yield _evaluation(config, options, scorer, number, policies[-1], said)


def _on(config: RootConfig, rows: list[str]) -> Any:
    """The data section for rows the loop has made: nothing of the original rows' shape applies to them."""
    data = replace(
        config.data, eval_path=None, eval_fraction=0.0, format="auto", columns={}, options={}, group_by=None, rating=[],
        leaks="keep",
    )  # fmt: skip
    if len(rows) == 1:
        return replace(data, path=rows[0], sources=[])
    return replace(data, path=None, sources=[SourceConfig(path=path) for path in rows])


def _sampling(
    config: RootConfig, options: Options, scorer: TextScorer, number: int, policy: str, form: str, own: Path
) -> Stage:  # fmt: skip
    def work(place: Path) -> dict[str, Any]:
        found = list(_answered(config, options, policy, _of_round(config, options, number), number))
        if options.own_answer:
            found = [_with_own(answer, config.eval.verifier) for answer in found]
        scored = [
            Scored(a.prompt.id, a.prompt.messages, a.texts, scores, a.measures, len(a.texts) > options.samples)
            for a, scores in zip(found, scorer(found), strict=True)
        ]
        rows, account = preference_rows(scored, threshold=options.threshold, form=form)
        if not rows:
            why = ", ".join(f"{reason} {count}" for reason, count in account.dropped.items())
            raise DataError(f"round {number}: no prompt gave a row ({why}); raise samples or temperature")
        write_atomic(place / "samples.jsonl", _lines([vars(one) for one in scored]))
        write_atomic(place / "rows.jsonl", _lines(rows))
        sampled = summary([replace(a, measures=a.measures[: options.samples]) for a in found])
        return account.as_json() | {"measures": sampled}

    known = ("prompts", "samples", "temperature", "measure", "own_answer", "threshold")
    said = {name: value for name, value in vars(options).items() if name in known} | {"scorer": scorer.identity}
    rows = {k: v for k, v in schema.flatten(config).items() if k.startswith("data.")}
    inputs = {"policy": policy, **said, "form": form, "seed": config.seed, **_generation(config), **rows}
    return Stage(f"round-{number}/samples", inputs, work)


def _with_own(answer: Answer, verifier: str | None) -> Answer:
    """``answer`` with the row's own text as the last one, where the row has one."""
    text = answer.prompt.answer
    if text is None:
        return answer
    measures = [*answer.measures, measures_of(answer.prompt, text, verifier)]
    return replace(answer, texts=[*answer.texts, text], measures=measures)


def _evaluation(
    config: RootConfig, options: Options, scorer: TextScorer, number: int, policy: str, said: dict[str, Any]
) -> Stage:  # fmt: skip
    def work(place: Path) -> dict[str, Any]:
        prompts = list(prompts_of(config.data, _plain(config), held_out=True, limit=options.held_out))
        greedy = replace(options, temperature=0.0, samples=1)
        found = list(_answered(config, greedy, policy, prompts, number))
        mean = means(scorer(found))  # a verifier that does not take the measure says so
        return {"prompts": len(prompts), **summary(found), **({} if scorer.is_verifier else {"score": mean})}

    inputs = {"policy": policy, "held_out": options.held_out, **_generation(config), **said}
    return Stage(f"round-{number}/evaluate", inputs, work)


def _plain(config: RootConfig) -> Needs:
    return replace(needs_of(make_objective(config)), stage=None)


def _of_round(config: RootConfig, options: Options, number: int) -> list[Prompt]:
    """The prompts of a round: the next ones in one order of all training prompts."""
    prompts = list(prompts_of(config.data, _plain(config), held_out=False))
    if not prompts:
        raise DataError("loop: the rows have no prompt to answer")
    order = permutation(len(prompts), config.seed, 0)
    first = (number - 1) * options.prompts
    return [prompts[order[i % len(prompts)]] for i in range(first, first + min(options.prompts, len(prompts)))]


def _answered(
    config: RootConfig, options: Options, policy: str, prompts: list[Prompt], number: int
) -> Iterator[Answer]:
    model = replace(config.model, name_or_path=policy, revision=None)
    sampler = Sampler(replace(config, model=model), "loop")
    yield from sampler.answers(
        prompts, temperature=options.temperature, num_samples=options.samples,
        seed=dist.derive_seed(config.seed, "loop", number),
    )  # fmt: skip
    del sampler  # the training that follows wants the device's memory
    gc.collect()


def _generation(config: RootConfig) -> dict[str, Any]:
    known = ("backend", "max_new_tokens", "verifier", "top_p", "batch_size")
    return {f"eval.{name}": getattr(config.eval, name) for name in known}


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _line(results: dict[str, dict[str, Any]], number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"round": number}
    if number:
        made = results[f"round-{number}/samples"]
        row |= {"rows_from": made["kept"], "dropped": made["dropped"], "sampled": made["mean_score"]}
        if "score" in results[f"round-{number}/evaluate"]:  # beside the scorer's opinion, the verifier's
            row |= {f"sampled_{name}": value for name, value in made["measures"].items()}
        row |= {"train_steps": results[f"round-{number}/train"]["steps"]}
    measures = results[f"round-{number}/evaluate"]
    return row | {name: value for name, value in measures.items() if name != "prompts"}


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
