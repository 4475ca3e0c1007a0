"""Student's t: points of its distribution, the interval of a mean, the interval of one more observation.

SciPy is not needed: with a whole number of degrees of freedom the distribution function has a closed form.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and the half width of the interval around it."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def within(t: float, degrees: int) -> float:
    """P(-t < T < t) for T with ``degrees`` degrees of freedom (Abramowitz and Stegun 1972, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(3 if odd else 2, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


@cache
def point(probability: float, degrees: int) -> float:
    """The t that T stays below with ``probability`` (0.995 for a 99 % interval); ValueError below one degree."""
    if degrees < 1 or not 0.5 < probability < 1:
        raise ValueError(f"no point of Student's t: probability {probability}, {degrees} degrees of freedom")
    inside, low, high = 2 * probability - 1, 0.0, 1.0
    while within(high, degrees) < inside:
        high *= 2
    for _ in range(100):  # halving stops at neighbouring floats well before
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, degrees) < inside else (low, middle)
    return high


def of_mean(values: Sequence[float], level: float = 0.95) -> Interval:
    """The interval that holds the mean of what ``values`` were drawn from: mean -+ t s / sqrt(n)."""
    half = point((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), half)


def of_next(values: Sequence[float], level: float = 0.99) -> Interval:
    """The prediction interval that holds one more draw: mean -+ t s sqrt(1 + 1/n).

    The least and the greatest of n draws are no such interval: one more draw falls outside of them with probability
    2 / (n + 1), one time in three for n = 5.
    """
    count = len(values)
    half = point((1 + level) / 2, count - 1) * statistics.stdev(values) * math.sqrt(1 + 1 / count)
    return Interval(statistics.fmean(values), half)
