"""How well a model does what its condition asks: a grid of conditions, the same prompts under each, and measures.

Every prompt is answered under every condition, so requested levels are independent of prompts and of each other, and a
plain rank correlation says what a request moves: its own dimension (control) or another (leakage).
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from alignlab.rewards.intervals import Draws, Interval


@dataclass(frozen=True)
class Reading:
    """One answer: its prompt, the levels that were requested (none: no condition), and what was measured on it."""

    prompt: str
    requested: Mapping[str, float]
    measured: Mapping[str, float]


@dataclass(frozen=True)
class Cell:
    """One condition of the grid: the means of everything measured under it."""

    requested: Mapping[str, float]
    means: Mapping[str, float]
    answers: int


@dataclass(frozen=True)
class Meter:
    """What a grid shows.  ``effect[d][m]`` is the Spearman correlation of what was requested of d with measure m."""

    controlled: list[str]
    measures: list[str]
    effect: dict[str, dict[str, Interval | None]]
    """None where the measure (or the request) never varies"""
    match: dict[str, Interval]
    """share of answers at exactly the requested level, for dimensions that are measured under their own name"""
    cells: list[Cell]
    front: list[int]
    """cells that no other cell beats in every measure of the front"""
    front_measures: list[str]
    free: Cell | None
    """the same prompts without a condition"""

    @property
    def control(self) -> float | None:
        """The mean of every dimension's effect on itself; what never varies follows no request and counts as 0.

        None where no controlled dimension is measured under its own name.
        """
        own = [self.effect[d][d] for d in self.followed]
        return sum(0.0 if one is None else one.value for one in own) / len(own) if own else None

    @property
    def followed(self) -> list[str]:
        """The controlled dimensions that are measured under their own name."""
        return [d for d in self.controlled if d in self.measures]

    def curve(self, dimension: str) -> dict[float, dict[str, float]]:
        """Requested level of ``dimension`` -> the means of everything measured, over all that is asked beside it."""
        levels = sorted({cell.requested[dimension] for cell in self.cells})
        return {level: self._means([c for c in self.cells if c.requested[dimension] == level]) for level in levels}

    @property
    def means(self) -> dict[str, float]:
        """The means of everything measured under all conditions."""
        return self._means(self.cells)

    def _means(self, cells: Sequence[Cell]) -> dict[str, float]:
        answers = [cell.answers for cell in cells]
        return {m: float(np.average([cell.means[m] for cell in cells], weights=answers)) for m in self.measures}


def grid(levels: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Every combination of one level of each dimension, the last dimension fastest."""
    return [dict(zip(levels, chosen, strict=True)) for chosen in product(*levels.values())]


def meter(
    readings: Sequence[Reading], draws: Draws, front: Sequence[str] = (), continuous: Collection[str] = ()
) -> Meter:
    """The figures of all readings; intervals draw prompts.  ``front``: measures to be maximised together.

    Without ``front`` these are the measures that no condition controls, or all of them where each is controlled.
    ``continuous``: measures that are no levels (a reward model's), so that none of them can match a request.
    """
    asked = [reading for reading in readings if reading.requested]
    controlled = list(asked[0].requested)
    measures = sorted(asked[0].measured)
    prompts = np.unique([reading.prompt for reading in asked], return_inverse=True)[1].ravel()
    requested = {name: np.array([reading.requested[name] for reading in asked]) for name in controlled}
    measured = {name: np.array([reading.measured[name] for reading in asked]) for name in measures}
    weights = _drawn(prompts, draws)
    effect = {
        d: {m: _interval(lambda w, d=d, m=m: spearman(requested[d], measured[m], w), weights) for m in measures}
        for d in controlled
    }
    match = {}
    for d in controlled:
        if d in measured and d not in continuous:
            right = (requested[d] == measured[d]).astype(float)
            found = _interval(lambda w, right=right: float((w * right).sum() / w.sum()), weights)
            assert found is not None
            match[d] = found
    cells = [_cell(condition, asked, measures) for condition in _conditions(asked)]
    chosen = list(front) or [m for m in measures if m not in controlled] or measures
    plain = [reading for reading in readings if not reading.requested]
    return Meter(
        controlled, measures, effect, match, cells,
        nondominated(np.array([[cell.means[m] for m in chosen] for cell in cells])), chosen,
        _cell({}, plain, measures) if plain else None,
    )  # fmt: skip


def spearman(left: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Rank correlation, ties at their mean rank; None where a side does not vary.

    ``weights`` (whole numbers) say how often each couple counts: the same as repeating it.
    """
    left, right = np.asarray(left), np.asarray(right)
    weights = np.ones(len(left)) if weights is None else weights
    a, b = mean_ranks(left, weights), mean_ranks(right, weights)
    a, b = a - (weights * a).sum() / weights.sum(), b - (weights * b).sum() / weights.sum()
    spread = (weights * a * a).sum() * (weights * b * b).sum()
    return None if spread <= 0 else float((weights * a * b).sum() / np.sqrt(spread))


def nondominated(points: np.ndarray) -> list[int]:
    """Rows of ``points`` [n, k] that no row exceeds somewhere without falling short elsewhere (the Pareto front)."""
    return [
        i for i, point in enumerate(points) if not ((points >= point).all(1) & (points > point).any(1)).any()
    ]  # fmt: skip


def mean_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each value's rank from 1, ties at their mean; ``weights`` say how often each value stands there."""
    place = np.unique(values, return_inverse=True)[1].ravel()
    counts = np.bincount(place, weights=weights)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _drawn(prompts: np.ndarray, draws: Draws) -> np.ndarray:
    """float64 [1 + resamples, readings]: how often each counts; first once each, then as prompts are drawn."""
    number = int(prompts.max()) + 1
    picked = np.random.default_rng(draws.seed).multinomial(number, np.full(number, 1 / number), size=draws.resamples)
    return np.concatenate((np.ones((1, number)), picked))[:, prompts]


def _interval(figure: Any, weights: np.ndarray) -> Interval | None:
    value = figure(weights[0])
    if value is None:
        return None
    found = [one for w in weights[1:] if (one := figure(w)) is not None]
    low, high = np.percentile(found, (2.5, 97.5)) if found else (value, value)
    return Interval(value, float(low), float(high), "bootstrap")


def _conditions(readings: Sequence[Reading]) -> list[dict[str, float]]:
    return [dict(key) for key in dict.fromkeys(tuple(reading.requested.items()) for reading in readings)]


def _cell(condition: Mapping[str, float], readings: Sequence[Reading], measures: Sequence[str]) -> Cell:
    own = [reading for reading in readings if dict(reading.requested) == dict(condition)]
    means = {m: float(np.mean([reading.measured[m] for reading in own])) for m in measures}
    return Cell(dict(condition), means, len(own))


# ---------------------------------------------------------------------------------------------------------------
# For reading
# ---------------------------------------------------------------------------------------------------------------


def table_text(found: Meter) -> list[str]:
    """The correlations (rows: what is requested, columns: what is measured), then the cells, front cells starred."""
    width = max(12, *(len(name) + 2 for name in (*found.measures, *found.controlled)))
    lines = ["requested \\ measured".ljust(22) + "".join(name.rjust(width) for name in found.measures) + "   exact"]
    for d in found.controlled:
        values = "".join(_number(found.effect[d][m]).rjust(width) for m in found.measures)
        lines.append(d.ljust(22) + values + (f"   {100 * found.match[d].value:.1f}%" if d in found.match else ""))
    lines.append("")
    lines.append("condition".ljust(34) + "".join(name.rjust(width) for name in found.measures))
    for place, cell in enumerate(found.cells):
        lines.append(_cell_line(cell, found.measures, width, starred=place in found.front))
    if found.free is not None:
        lines.append(_cell_line(found.free, found.measures, width, starred=False))
    lines.append(f"* on the Pareto front of {', '.join(found.front_measures)}")
    if found.control is not None:
        lines.append(
            f"control {found.control:+.2f}, the mean correlation of {', '.join(found.followed)} with their requests"
        )
    return lines


def _number(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:+.2f}"


def _cell_line(cell: Cell, measures: Sequence[str], width: int, *, starred: bool) -> str:
    name = ", ".join(f"{d} {level:g}" for d, level in cell.requested.items()) or "no condition"
    return f"{'*' if starred else ' '} {name}".ljust(34) + "".join(
        f"{cell.means[m]:.3f}".rjust(width) for m in measures
    )


def as_json(found: Meter) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "effect": {
            d: {m: None if i is None else i.as_json() for m, i in row.items()} for d, row in found.effect.items()
        },
        "control": found.control,
        "match": {d: interval.as_json() for d, interval in found.match.items()},
        "means": found.means,
        "curves": {d: {f"{at:g}": means for at, means in found.curve(d).items()} for d in found.controlled},
        "cells": [{"requested": dict(c.requested), "means": dict(c.means), "answers": c.answers} for c in found.cells],
        "front": [dict(found.cells[place].requested) for place in found.front],
        "front_measures": found.front_measures,
        "no_condition": None if found.free is None else dict(found.free.means),
    }


def plot(found: Meter) -> bytes:
    """A PNG: the correlations as a map, and for each controlled dimension the mean measured at each requested level."""
    from matplotlib.figure import Figure

    own = [d for d in found.controlled if d in found.measures]
    figure = Figure(figsize=(4.8 + 3.2 * len(own), 3.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(own), squeeze=False)[0]
    values = np.array(
        [[np.nan if (i := found.effect[d][m]) is None else i.value for m in found.measures] for d in found.controlled]
    )
    axes[0].imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    axes[0].set_xticks(range(len(found.measures)), found.measures, rotation=30, ha="right")
    axes[0].set_yticks(range(len(found.controlled)), found.controlled)
    axes[0].set(title="rank correlation", xlabel="measured", ylabel="requested")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            shade = "white" if abs(value) > 0.6 else "black"
            axes[0].text(column, row, f"{value:.2f}", ha="center", va="center", color=shade)
    for axis, d in zip(axes[1:], own, strict=True):
        curve = found.curve(d)
        if d in found.match:  # else the measure is on a scale of its own
            axis.plot([*curve], [*curve], color="0.6", linestyle="--", linewidth=1, label="as requested")
        axis.plot([*curve], [means[d] for means in curve.values()], marker="o", label="measured")
        axis.set(title=d, xlabel="requested level", ylabel="mean measured level")
        axis.legend(fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    return drawn.getvalue()
