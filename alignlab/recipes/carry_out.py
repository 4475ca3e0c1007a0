"""Cases of recipes carried out: all stages in one go, equal ones once; then verdicts, or bands from many seeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.errors import AlignlabError, ConfigError
from alignlab.processes import StopFlag
from alignlab.recipes import bands, circumstances
from alignlab.recipes.measures import measured
from alignlab.recipes.plan import Case, Planned, plan
from alignlab.recipes.scale import Scale
from alignlab.recipes.verdict import Verdict, lines_of
from alignlab.recipes.work import work_of
from alignlab.stages import Shared, done_before, run_shared

Say = Callable[[str, str, float], None]
"""Told of each stage: its name, what became of it, the seconds that took."""


@dataclass(frozen=True)
class Outcome:
    """A case, its stages, and the records of those that are done; ``error`` says why others are not."""

    case: Case
    stages: dict[str, Planned]
    records: dict[str, dict[str, Any]]
    error: Exception | None

    def measured(self) -> dict[str, float]:
        """The metrics whose stages are done; ConfigError for a path that leads to no number."""
        return measured(self.case.scale, {name: record["result"] for name, record in self.records.items()})

    @property
    def seconds(self) -> float:
        """What its stages took, one after the other."""
        return sum(record["seconds"] for record in self.records.values())


def carry_out(cases: Sequence[Case], home: Path, workers: int, stop: StopFlag, say: Say) -> list[Outcome]:
    """Do every stage that is not done yet; all cases are planned, and so checked, before the first stage starts."""
    plans = [plan(case, home) for case in cases]
    versions = circumstances.versions()
    names = _names(cases, plans)
    todo = {
        one.folder: Shared(
            one.folder, one.key,
            {"settings": one.named, "needs": {name: need.key for name, need in one.needs.items()}},
            tuple(need.folder for need in one.needs.values()), work_of(one, stop), {"versions": versions},
        )
        for planned in plans
        for one in planned.values()
    }  # fmt: skip
    for stage in todo.values():
        _check_defaults(stage)
    done, failed = run_shared(
        todo.values(), workers, stop, lambda stage, what, seconds: say(names[stage.folder], what, seconds)
    )
    return [
        Outcome(
            case, planned, {name: done[one.folder] for name, one in planned.items() if one.folder in done},
            next((failed[one.folder] for one in planned.values() if one.folder in failed), None),
        )
        for case, planned in zip(cases, plans, strict=True)
    ]  # fmt: skip


def _check_defaults(stage: Shared) -> None:
    """Defaults are no part of a stage's name: one that was done when a default was another is not taken for this."""
    record = done_before(stage)
    before, now = (one["inputs"]["settings"] if one else {} for one in (record, {"inputs": stage.inputs}))
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    if record is not None and changed:
        raise ConfigError(f"{stage.folder}: was done with other defaults ({'; '.join(changed[:4])}); remove the folder")


def _names(cases: Sequence[Case], plans: Iterable[dict[str, Planned]]) -> dict[Path, str]:
    """What each folder's stage is called on the screen: ``recipe/stage`` of the first case that has it."""
    found: dict[Path, str] = {}
    seeds = len({case.seed for case in cases}) > 1
    for case, planned in zip(cases, plans, strict=True):
        for name, one in planned.items():
            text = f"{case.scale.recipe}/{name}" + (f" seed {case.seed}" if seeds else "")
            tried = case.broken and name == case.scale.broken[case.broken].stage
            found.setdefault(one.folder, text + (f" ({case.broken})" if tried else ""))
    return found


def verdict(outcome: Outcome, home: Path) -> Verdict:
    """The metrics of a case against the bands of ``expected.json``."""
    case, scale = outcome.case, outcome.case.scale
    expected = bands.read(scale.folder).get(scale.name, {})
    only = scale.broken[case.broken].metric if case.broken else None
    error, values = outcome.error, {}
    try:
        values = outcome.measured()
    except ConfigError as wrong:
        error = error or wrong
    if error is not None and not isinstance(error, AlignlabError):
        raise error
    lines = lines_of(scale, values, bands.bands(expected), bands.without(expected), only)
    differs, unknown = ([], "") if case.broken or not expected else _compared(outcome, expected, home)
    done_with = [record["versions"] for record in outcome.records.values()]
    versions = circumstances.other_versions(expected, done_with) if expected else []
    return Verdict(scale, case.seed, lines, case.broken, differs, versions, unknown, str(error) if error else "",
                   error.exit_code if isinstance(error, AlignlabError) else 0)  # fmt: skip


def _compared(outcome: Outcome, expected: dict[str, Any], home: Path) -> tuple[list[str], str]:
    """What differs from the record, composed with a seed of the record; and what could not be compared."""
    case, seeds = outcome.case, list(expected["seeds"])
    seed = case.seed if case.seed in seeds else seeds[0]
    stages = outcome.stages
    if seed != case.seed:
        stages = plan(Case(case.scale, seed, case.rows, case.changes, None, case.only), home)
    now = circumstances.of_stages(stages) | {"templates": circumstances.templates(outcome.stages)}
    if case.only:
        names = {"*", *stages}
        expected = {**expected, "settings": {k: v for k, v in expected["settings"].items() if k in names}}
    rows = circumstances.data(outcome.stages)
    found = list(circumstances.differences(expected, now, case.seed, rows))
    if not circumstances.seeds_without(expected, case.seed, rows):
        return found, ""
    known = ", ".join(map(str, seeds))
    unknown = f"rows of seed {case.seed} have no record; those of seeds {known} have (seed={seeds[0]} compares them)"
    return found, unknown


@dataclass(frozen=True)
class Calibration:
    """One scale's entry of ``expected.json``, and for each metric which wrong settings it does not notice."""

    scale: Scale
    entry: dict[str, Any]
    unnoticed: dict[str, list[str]]


def calibrate(scale: Scale, outcomes: Sequence[Outcome], workers: int) -> Calibration:
    """Bands from the cases of one recipe: one a seed, and for every wrong setting one of the first seed.

    Raises what kept a stage from being done.
    """
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    plain = [outcome for outcome in outcomes if outcome.case.broken is None]
    wrong = [outcome for outcome in outcomes if outcome.case.broken is not None]
    values = [outcome.measured() for outcome in plain]
    tried = {str(o.case.broken): o.measured()[scale.broken[str(o.case.broken)].metric] for o in wrong}
    metrics, warnings = {}, {}
    for name, metric in scale.metrics.items():
        own = [one[name] for one in values]
        band = bands.band_or_why(metric, own)
        metrics[name] = {
            "values": [bands.rounded(value) for value in own], "mean": bands.rounded(statistics.fmean(own)),
            **({"no_band": band} if isinstance(band, str) else {"band": [band.low, band.high]}),
        }  # fmt: skip
        warnings[name] = [
            f"has no band to notice the broken setting '{key}'" if isinstance(band, str)
            else f"the band holds the broken setting '{key}' ({value:.4g})"
            for key, value in tried.items()
            if scale.broken[key].metric == name and (isinstance(band, str) or band.holds(value))
        ]  # fmt: skip
    broken_entry = {
        name: {"metric": scale.broken[name].metric, "value": bands.rounded(value), "seed": wrong[0].case.seed}
        for name, value in tried.items()
    }
    entry = {
        "level": bands.LEVEL, "seeds": [outcome.case.seed for outcome in plain], "metrics": metrics,
        "broken": broken_entry, **circumstances.of_stages(plain[0].stages),
        "data": {str(outcome.case.seed): circumstances.data(outcome.stages) for outcome in plain},
        "versions": circumstances.versions(), "machine": circumstances.machine(),
        "seconds": {"stages": round(statistics.fmean(outcome.seconds for outcome in plain)), "workers": workers},
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    return Calibration(scale, entry, {name: said for name, said in warnings.items() if said})
