"""Which pairs were probably labelled the wrong way round: what a run's own margins say of its data.

A pair that is labelled like the others around it is learnt with them; a flipped one is preferred the wrong way until it
is learnt by heart.  The figures of a pair over its visits follow Swayamdipta et al. 2020 (Dataset Cartography,
arXiv 2009.10795, section 2): confidence is the mean of ``sigmoid(margin)``, variability its standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from alignlab.measuring.control import mean_ranks

WINDOW = 256
"""Visits, in the order of training, that a margin is compared with: those of about the same time."""


@dataclass(frozen=True)
class Paths:
    """Every pair's visits.  Arrays are [pairs], ``steps`` and ``margins`` ragged: pair i owns ``ptr[i]:ptr[i + 1]``."""

    sample: np.ndarray
    """int64: stored number of the sample"""
    chosen: np.ndarray
    rejected: np.ndarray
    ptr: np.ndarray
    steps: np.ndarray
    margins: np.ndarray

    def __len__(self) -> int:
        return len(self.sample)

    def of(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """(steps, margins) of one pair, by step."""
        own = slice(int(self.ptr[pair]), int(self.ptr[pair + 1]))
        return self.steps[own], self.margins[own]


@dataclass(frozen=True)
class Figures:
    """What the visits of each pair say; arrays [pairs]."""

    visits: np.ndarray
    mean: np.ndarray
    """mean margin"""
    last: np.ndarray
    """margin at the last visit"""
    confidence: np.ndarray
    """mean of sigmoid(margin)"""
    variability: np.ndarray
    """standard deviation of sigmoid(margin)"""
    flips: np.ndarray
    """how often the margin's sign changed from one visit to the next"""
    suspicion: np.ndarray
    """how far below its contemporaries the pair was, in their standard deviations; high: probably the wrong way"""


def paths(table: pa.Table) -> Paths:
    """The visits in ``table`` (``train.margins.SCHEMA``, by step), by pair."""
    step, sample, chosen, rejected, margin = (table[name].to_numpy() for name in table.column_names)
    keys, pair = np.unique(np.stack((sample, chosen, rejected)), axis=1, return_inverse=True)
    order = np.argsort(pair.ravel(), kind="stable")
    counts = np.bincount(pair.ravel(), minlength=keys.shape[1])
    ptr = np.concatenate(([0], np.cumsum(counts)))
    return Paths(keys[0], keys[1], keys[2], ptr, step[order], margin[order].astype(np.float64))


def figures(found: Paths) -> Figures:
    """The figures of every pair.

    *suspicion*: with m a visit's margin, mu and s the mean and standard deviation of the margins of about the same
    time, ``sum (mu - m) / sum s`` over the pair's visits.  Early on margins are all alike and s is small, so those
    visits count for little; later on a pair that stays below the others stands out by how far.
    """
    owner = np.repeat(np.arange(len(found)), np.diff(found.ptr))
    mu, spread = _contemporaries(found.steps, found.margins)
    probability = 1 / (1 + np.exp(-np.clip(found.margins, -500, 500)))
    visits = np.diff(found.ptr)
    confidence = _sum(owner, probability, visits) / visits
    squares = _sum(owner, (probability - confidence[owner]) ** 2, visits)
    changes = np.zeros(len(found.margins))
    changes[1:] = np.diff(np.sign(found.margins)) != 0
    changes[found.ptr[:-1]] = 0  # a pair's first visit changes nothing
    below, scale = _sum(owner, mu - found.margins, visits), _sum(owner, spread, visits)
    return Figures(
        visits=visits,
        mean=_sum(owner, found.margins, visits) / visits,
        last=found.margins[found.ptr[1:] - 1],
        confidence=confidence,
        variability=np.sqrt(squares / visits),
        flips=_sum(owner, changes, visits).astype(np.int64),
        suspicion=np.divide(below, scale, out=np.zeros(len(visits)), where=scale > 0),
    )


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """How often a positive scores above a negative, ties half (Mann-Whitney's U over the number of such couples)."""
    positive = np.asarray(positive, dtype=bool)
    if positive.all() or not positive.any():
        raise ValueError("an area under the curve needs positives and negatives")
    rank = mean_ranks(scores, np.ones(len(positive)))
    number = int(positive.sum())
    return float((rank[positive].sum() - number * (number + 1) / 2) / (number * (len(positive) - number)))


def _sum(owner: np.ndarray, values: np.ndarray, visits: np.ndarray) -> np.ndarray:
    return np.bincount(owner, weights=values, minlength=len(visits))


def _contemporaries(steps: np.ndarray, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) of the ``WINDOW`` visits around each visit in the order of training."""
    order = np.argsort(steps, kind="stable")
    sorted_margins = margins[order]
    sums = np.concatenate(([0.0], np.cumsum(sorted_margins)))
    squares = np.concatenate(([0.0], np.cumsum(sorted_margins**2)))
    size = min(WINDOW, len(order))
    first = np.clip(np.arange(len(order)) - size // 2, 0, len(order) - size)
    mean = (sums[first + size] - sums[first]) / size
    variance = np.maximum((squares[first + size] - squares[first]) / size - mean**2, 0.0)
    mu, spread = np.empty_like(mean), np.empty_like(mean)
    mu[order], spread[order] = mean, np.sqrt(variance)
    return mu, spread
