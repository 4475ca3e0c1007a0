"""What a run of a recipe came to: each metric against its band, and where it is outside, what is not as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignlab.recipes.bands import Band
from alignlab.recipes.scale import Metric, Scale
from alignlab.recipes.shelf import EXPECTED

HEADS = ("measure", "published", "expected at this scale", "measured", "inside?")
NO_BAND = "no band yet"
NOT_JUDGED = "not judged"
"""The seeds differ by more than what the figure would show: a band that could not fail is none."""


@dataclass(frozen=True)
class Line:
    """One metric: ``value`` is None where its stages were not done, NaN where they do not define it."""

    metric: Metric
    value: float | None
    band: Band | None
    blind: str = ""
    """why the seeds gave no band that could fail"""

    @property
    def defined(self) -> bool:
        return self.value is None or not math.isnan(self.value)

    @property
    def inside(self) -> bool | None:
        """None where there is nothing to compare."""
        return None if self.value is None or self.band is None else self.band.holds(self.value)

    def cells(self) -> list[str]:
        none = NOT_JUDGED if self.blind else NO_BAND
        inside = {None: "not measured" if self.value is None else none, True: "yes", False: "NO"}[self.inside]
        value = "-" if self.value is None else figure(self.value if self.defined else None)
        return [self.metric.say, self.metric.published or "-", str(self.band) if self.band else none, value, inside]

    def as_json(self) -> dict[str, Any]:
        band = [self.band.low, self.band.high] if self.band else None
        return {"metric": self.metric.name, "say": self.metric.say, "published": self.metric.published,
                "band": band, "no_band": self.blind or None, "measured": self.value if self.defined else None,
                "undefined": not self.defined, "inside": self.inside}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """All metrics of one case."""

    scale: Scale
    seed: int
    lines: list[Line]
    broken: str | None = None
    """the wrong setting that was tried: its metric ought to be outside"""
    differs: list[str] = field(default_factory=list)
    """settings, rows and templates that are not as they were when the bands were measured"""
    versions: list[str] = field(default_factory=list)
    """likewise versions; said where something is outside"""
    unknown: str = ""
    """what could not be compared"""
    error: str = ""
    """why stages were not done"""
    exit_code: int = 0
    """that of the error"""

    @property
    def outside(self) -> list[Line]:
        return [line for line in self.lines if line.inside is False]

    @property
    def passed(self) -> bool:
        """Nothing outside; of a broken setting: its metric is outside, or has no band to be outside of."""
        if self.error:
            return False
        return not any(line.inside for line in self.lines) if self.broken else not self.outside

    def rows(self) -> list[list[str]]:
        """The cells of the table."""
        rows = [line.cells() for line in self.lines]
        if self.broken:
            rows = [[f"broken '{self.broken}': {row[0]}", *row[1:4], _BROKEN[line.inside]]
                    for row, line in zip(rows, self.lines, strict=True)]  # fmt: skip
        return rows

    def remarks(self) -> list[str]:
        """What to say below the table."""
        name, found = self.scale.recipe, []
        if self.error:
            found.append(f"failed   {name}: {self.error}")
        for line in self.outside if not self.broken else ():
            value = f"{line.value:.6g} is" if line.defined else "this run does not define it, so it is"
            found.append(f"outside  {name} {line.metric.name}: {value} not in {line.band}")
        if self.broken:
            found += [f"blind    {name}: the broken setting '{self.broken}' stays inside {line.metric.name}'s band "
                      f"({line.band}): the band cannot see it" for line in self.lines if line.inside]  # fmt: skip
        else:
            differs = [*self.differs, *(self.versions if self.outside else ())]
            if self.outside and not differs:
                compared = "setting, template or version" if self.unknown else "setting, rows, template or version"
                differs = [f"no {compared} from what {name}/{EXPECTED} recorded"]
            found += [f"differs  {name}: {text}" for text in differs]
        if self.unknown and (self.outside or self.differs) and not self.broken:
            found.append(f"unknown  {name}: {self.unknown}")
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.scale.recipe, "scale": self.scale.name, "seed": self.seed, "broken": self.broken,
            "passed": self.passed, "error": self.error or None, "metrics": [line.as_json() for line in self.lines],
            "differs": self.differs, "versions": self.versions, "not_compared": self.unknown or None,
        }  # fmt: skip


def figure(value: float | None) -> str:
    """A measured figure as a table has it; None: its run does not define it."""
    return "not defined" if value is None else f"{value:.4g}"


_BROKEN = {None: NO_BAND, True: "YES: not noticed", False: "no, as it should"}


def lines_of(
    scale: Scale, values: Mapping[str, float], bands: Mapping[str, Band], blind: Mapping[str, str], only: str | None
) -> list[Line]:
    """A line a metric, or the one that is named; ``blind``: why metrics have no band."""
    return [Line(metric, values.get(name), bands.get(name), blind.get(name, ""))
            for name, metric in scale.metrics.items() if only in (None, name)]  # fmt: skip


def markdown(verdicts: Iterable[Verdict]) -> str:
    """One table of all verdicts, and what is to be said below."""
    verdicts = list(verdicts)
    several = len({verdict.scale.recipe for verdict in verdicts}) > 1
    heads = ["recipe", *HEADS] if several else list(HEADS)
    rows = [[verdict.scale.recipe, *row] if several else row for verdict in verdicts for row in verdict.rows()]
    table = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    remarks = [f"- {remark}" for verdict in verdicts for remark in verdict.remarks()]
    return "\n".join(["| " + " | ".join(row) + " |" for row in table] + (["", *remarks] if remarks else [])) + "\n"


def text(verdicts: Iterable[Verdict]) -> str:
    """The same for a terminal."""
    found = []
    for verdict in verdicts:
        broken = f"   broken: {verdict.broken}" if verdict.broken else ""
        found.append(f"verdict  {verdict.scale.recipe} scale={verdict.scale.name} seed={verdict.seed}{broken}")
        rows = [list(HEADS), *verdict.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
        found += [
            "  " + "  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        found += verdict.remarks()
    return "\n".join(found)
