"""How far apart two runs are: the largest relative difference of each quantity that the loop produces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from safetensors.torch import load_file
from torch import Tensor

from alignlab.equivalence.cells import Tolerance

FLOOR = 1e-6
"""Losses and gradient norms smaller than this count as this large: a difference relative to nothing says nothing."""
ONE = 1.0
"""The same for statistics and scores: margins are small differences of large log-probabilities."""


@dataclass
class Trace:
    """What one run left.  Lists are by optimizer step."""

    parameters: str
    """file of the trained parameters at the end, in the precision of the update"""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    statistics: list[dict[str, float]] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    moved: float = 0.0
    """2-norm of the whole update"""
    tokens: int = 0
    """computed in the first step, prefixes that stand once counted once, padding included"""
    dtype: str = ""
    layout: str = ""
    attention: str = ""
    """the attention function that ran"""
    recomputes: bool = False
    """activation checkpointing is in force, not only asked for"""
    seconds: float = 0.0
    scores: float | None = None
    """of a run whose export was opened again: the largest relative difference of a sequence's score"""


def relative(a: float, b: float, floor: float = FLOOR) -> float:
    """``|a - b| / max(|a|, |b|, floor)``; infinite where a value is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), floor)


def differences(base: Trace, variant: Trace, *, first_statistics: int | None) -> dict[str, float]:
    """Largest relative difference of ``loss``, ``grad_norm``, ``statistics`` and ``update``.

    ``first_statistics`` is the first step (0-based) whose statistics are compared, None for none of them.
    """
    found = {
        "loss": _largest(base.losses, variant.losses),
        "grad_norm": _largest(base.grad_norms, variant.grad_norms),
    }
    if first_statistics is not None:
        pairs = zip(base.statistics[first_statistics:], variant.statistics[first_statistics:], strict=True)
        found["statistics"] = max((_statistics(a, b) for a, b in pairs), default=0.0)
    found["update"] = update_difference(base, variant)
    return found


def _largest(base: list[float], variant: list[float]) -> float:
    if len(base) != len(variant):
        return math.inf
    return max(relative(a, b) for a, b in zip(base, variant, strict=True))


def _statistics(base: dict[str, float], variant: dict[str, float]) -> float:
    if base.keys() != variant.keys():
        return math.inf  # a statistic that comes and goes
    return max((relative(base[name], variant[name], ONE) for name in base), default=0.0)


def update_difference(base: Trace, variant: Trace) -> float:
    """2-norm of the final parameters' difference over that of the base's whole update, all parameters together.

    0 where nothing differs, infinite where something does and the base did not move.
    """
    final, other = load_file(base.parameters), load_file(variant.parameters)
    if final.keys() != other.keys():
        return math.inf
    apart = distance(final, other)
    if apart == 0.0:
        return 0.0
    return apart / base.moved if math.isfinite(apart) and base.moved else math.inf


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """2-norm of the difference of two sets of tensors, in float64."""
    return math.sqrt(sum(float((one[name].double() - other[name].double()).square().sum()) for name in one))


def allowed(quantity: str, tolerance: Tolerance) -> float:
    """The tolerance of one quantity of :func:`differences`."""
    return tolerance.update if quantity == "update" else tolerance.numbers
