"""``expected.json``: the band that each metric of a recipe is expected in, by scale, and what it was measured under.

A band is the 99 % prediction interval for one more run (:func:`alignlab.student.of_next`), from runs with other seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab import student
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError
from alignlab.recipes.scale import Metric
from alignlab.recipes.shelf import EXPECTED

LEVEL = 0.99
LEAST = 3
"""Seeds below which a band says nothing: with two, Student's t is 63.7."""
DIGITS = 3
"""Digits of half a band's width that its ends are given in, rounded outwards."""


@dataclass(frozen=True)
class Band:
    """Where one more run's figure is expected."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}"


def band_of(values: Sequence[float]) -> Band:
    """The band of one metric's values over seeds."""
    found = student.of_next(values, LEVEL)
    scale = found.half or abs(found.mean) or 1.0
    places = DIGITS - 1 - math.floor(math.log10(scale))
    step = 10.0**places
    return Band(
        _clean(math.floor(found.low * step) / step, places), _clean(math.ceil(found.high * step) / step, places)
    )


def _clean(value: float, places: int) -> float:
    return round(value, max(places, 0)) + 0.0  # no -0.0


def rounded(value: float) -> float | None:
    """A measured figure as it is recorded: six digits; null for one that its run does not define."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def cannot_fail(metric: Metric, band: Band) -> str:
    """Why a band would judge nothing: it holds what a run without the effect gives, too; empty where it may fail."""
    nothing = metric.without_effect
    if nothing is not None and band.holds(nothing):
        return f"the seeds' band ({band}) holds {nothing:g}: a run without the effect would pass"
    if nothing is None and band.low <= 0.0 and band.high >= 1.0:
        return f"the seeds' band ({band}) holds everything from 0 to 1"
    if band.low == band.high:
        return "the seeds do not differ, so they say nothing of other runs"
    return ""


def band_or_why(metric: Metric, values: Sequence[float]) -> Band | str:
    """The band of one metric's values over seeds, or why they give none that could fail."""
    undefined = sum(map(math.isnan, values))
    if undefined:
        return f"not defined in {undefined} of {len(values)} seeds"
    band = band_of(values)
    return cannot_fail(metric, band) or band


def read(recipe: Path) -> dict[str, Any]:
    """The whole file, by scale; empty where the recipe has none yet."""
    path = recipe / EXPECTED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); calibrate= writes it anew") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected an object by scale; calibrate= writes it anew")
    return found


def bands(expected: Mapping[str, Any]) -> dict[str, Band]:
    """The bands of one scale's entry."""
    return {name: Band(*entry["band"]) for name, entry in expected.get("metrics", {}).items() if entry.get("band")}


def without(expected: Mapping[str, Any]) -> dict[str, str]:
    """Why measured metrics have no band: it could not fail."""
    return {name: entry["no_band"] for name, entry in expected.get("metrics", {}).items() if entry.get("no_band")}


def write(recipe: Path, scale: str, entry: Mapping[str, Any]) -> Path:
    """Put one scale's entry into the file, whole or not at all; the other scales stay."""
    path = recipe / EXPECTED
    found = {**read(recipe), scale: dict(entry)}
    write_atomic(path, json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    return path
