"""``alignlab evaluate rm=MODEL data=ROWS``: what a reward model is worth on pairs, benchmarks, rated answers, trees."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig
from alignlab.durable import write_atomic, write_named
from alignlab.errors import ConfigError
from alignlab.measuring.scorers import short_name
from alignlab.measuring.scoring import Scored, reward_model, same_pairs, score
from alignlab.request import Request, emit
from alignlab.rewards import report
from alignlab.rewards.benchmarks import benchmark
from alignlab.rewards.compare import compare
from alignlab.rewards.intervals import RESAMPLES, Draws
from alignlab.rewards.pairs import Calibration, by_category, calibration, figures, length_slope, signs
from alignlab.rewards.plot import reliability
from alignlab.rewards.pools import best_of
from alignlab.runfolder import RunFolder
from alignlab.verbs.options import measurement_name, own_options


@dataclass
class Options:
    """The verb's own settings where a reward model is evaluated."""

    rm: list[str] = field(default_factory=list)
    """A run, a model folder or a hub name; ``[A, B]`` compares A with B on the same rows."""
    against: str | None = None
    """The second model, said the other way."""
    plot: str | None = None
    """Where the reliability plot goes (PNG); default: beside the figures in the run's ``eval/``."""
    rewards: str | None = None
    """Where every pair's rewards go (JSON lines, those of both models)."""
    resamples: int = RESAMPLES
    """Draws of the bootstrap; ``seed`` is the run's."""
    alone: int = 32
    """So many answers are scored once more one by one; 0: none."""


def run(request: Request) -> int:
    """Print the table; JSON and the run's ``eval/rm-<rows>-<8 hex>.json`` hold all figures."""
    options = own_options(request, Options)
    names = [*options.rm, *([options.against] if options.against else [])]
    _check(request, options, names)
    config: RootConfig = request.config
    if config.data.path is None and config.data.eval_path is None and not config.data.sources:
        raise ConfigError("evaluate: data is missing; e.g. data=pairs.jsonl")
    draws = Draws(options.resamples, config.seed)
    found = [_scored(config, name, options) for name in names]
    results = [_measured(one, draws) for one, _ in found]
    calibrations = {}
    for (one, _), result in zip(found, results, strict=True):
        print(_head(one))
        print(_rows(one))
        if one.ends_in_pad:
            print(
                f"warning  {one.ends_in_pad} answers end with the model's pad token: transformers' own pooling reads "
                "the token before it, these figures read the last one"
            )
        for line in report.lines(result):
            print(line)
        name = short_name(one.model)
        calibrations[one.model if name in calibrations else name] = calibration(one.judged.margins)
    result = results[0]
    if len(found) == 2:
        result |= {"against": results[1], "comparison": _compared(found[0][0], found[1][0], draws)}
        for line in report.comparison(result["comparison"]):
            print(line)
    for path in _written(config, options, found, names, result, calibrations):
        print(f"written  {path}")
    emit(request, result)
    return 0


def _check(request: Request, options: Options, names: list[str]) -> None:
    problems = []
    if request.target is not None or request.config.model.name_or_path != "???":
        problems.append("evaluate: rm= names the model; give no other one (model.dtype=, model.layout= ... are fine)")
    if "" in names:
        problems.append("rm: empty; give rm=<run, folder or hub name>")
    if not options.rm:
        problems.append("against=: say which model is compared with it, rm=<run, folder or hub name>")
    if len(names) > 2:
        problems.append(f"rm: two models can be compared, not {len(names)}")
    if options.resamples < 100:
        problems.append(f"resamples: {options.resamples} (expected at least 100)")
    if options.alone < 0:
        problems.append(f"alone: {options.alone} (expected 0 or more)")
    if problems:
        raise ConfigError("\n".join(problems))


def _scored(config: RootConfig, name: str, options: Options) -> tuple[Scored, RunFolder | None]:
    path, folder = reward_model(name)
    return score(replace(config, model=replace(config.model, name_or_path=path)), alone=options.alone), folder


def _measured(scored: Scored, draws: Draws) -> dict[str, Any]:
    judged, manifest = scored.judged, scored.prepared.manifest
    return {
        "model": scored.model,
        "layout": scored.layout,
        "dtype": scored.dtype,
        "template": scored.template,
        "rows": {name: manifest[name] for name in ("read", "kept", "dropped", "parts")},
        "resamples": draws.resamples,
        "seed": draws.seed,
        **figures(judged, draws),
        "categories": by_category(judged, draws),
        "benchmark": benchmark(judged, draws),
        "length_slope": length_slope(judged),
        "signs": signs(judged, draws),
        "calibration": asdict(calibration(judged.margins)),
        "batch_invariance": asdict(scored.alone) if scored.alone else None,
        "best_of_n": best_of(judged, draws),
    }


def _compared(one: Scored, other: Scored, draws: Draws) -> dict[str, Any]:
    mine, theirs, left_out = same_pairs(one, other)
    return {"against_model": other.model, "left_out": left_out, **compare(mine, theirs, draws)}


def _head(scored: Scored) -> str:
    size = f"{scored.parameters / 1e6:,.1f}M parameters"
    return f"model    {scored.model}   {size}   {scored.dtype}   {scored.layout_line}"


def _rows(scored: Scored) -> str:
    manifest = scored.prepared.manifest
    dropped = manifest["read"] - manifest["kept"]
    reasons = ", ".join(f"{name} {n}" for name, n in sorted(manifest["dropped"].items()))
    parts = ", ".join(f"{name} {n}" for name, n in sorted(manifest["parts"].items()))
    taken = len(scored.prepared.index)
    return (
        f"rows     {manifest['read']:,} read = {manifest['kept']:,} kept + {dropped:,} dropped"
        + (f" ({reasons})" if reasons else "")
        + (f"   parts left out: {parts}" if parts else "")
        + (f"   the first {taken:,} of them" if taken < manifest["samples"] else "")
        + f"   {len(scored.judged.pairs):,} pairs   template {scored.template}"
    )


def _written(
    config: RootConfig, options: Options, found: list[tuple[Scored, RunFolder | None]], names: list[str],
    result: dict[str, Any], calibrations: dict[str, Calibration],
) -> list[Path]:  # fmt: skip
    """Write the figures into the run's folder, where the first model is one, the plot and the rewards; the paths."""
    written, folder = [], found[0][1]
    plot = Path(options.plot).expanduser() if options.plot else None
    if folder is not None:
        folder.eval.mkdir(exist_ok=True)
        said = {"against": names[1:], "resamples": options.resamples, "seed": config.seed}
        name = measurement_name(config, "rm", said)
        figures_path = folder.eval / f"{name}.json"
        write_atomic(figures_path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        written.append(figures_path)
        plot = plot or folder.eval / f"{name}.png"
    if plot is not None:
        write_named("plot", plot, reliability(calibrations))
        written.append(plot)
    if options.rewards:
        path = Path(options.rewards).expanduser()
        lines = [json.dumps({"model": one.model, **pair}) for one, _ in found for pair in one.judged.by_pair()]
        write_named("rewards", path, "".join(f"{line}\n" for line in lines))
        written.append(path)
    return written
