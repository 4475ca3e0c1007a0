"""What the margins of a run say of its pairs: figures worked out by hand, and planted flips that are found."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from alignlab.measuring.forensics import WINDOW, area_under_curve, figures, paths
from alignlab.train.margins import SCHEMA


def table(*visits: tuple[int, int, int, int, float]) -> pa.Table:
    """Visits as (step, sample, chosen, rejected, margin)."""
    return pa.table([list(column) for column in zip(*visits, strict=True)], names=SCHEMA.names).cast(SCHEMA)


def test_visits_are_gathered_by_pair() -> None:
    found = paths(table((1, 7, 0, 1, 0.5), (1, 3, 0, 1, -1.0), (2, 7, 0, 2, 2.0), (3, 7, 0, 1, -0.25)))
    assert found.sample.tolist() == [3, 7, 7]
    assert found.rejected.tolist() == [1, 1, 2]
    assert [[part.tolist() for part in found.of(pair)] for pair in range(3)] == [
        [[1], [-1.0]],
        [[1, 3], [0.5, -0.25]],
        [[2], [2.0]],
    ]


def test_figures_by_hand() -> None:
    """Two pairs, two visits each: margins 1, 3 and -1, 1.  All four are contemporaries: mean 1, variance 2."""
    found = figures(paths(table((1, 0, 0, 1, 1.0), (1, 1, 0, 1, -1.0), (2, 0, 0, 1, 3.0), (2, 1, 0, 1, 1.0))))
    assert found.visits.tolist() == [2, 2]
    assert found.mean.tolist() == [2.0, 0.0]
    assert found.last.tolist() == [3.0, 1.0]
    assert found.flips.tolist() == [0, 1]
    logistic = [1 / (1 + math.exp(-m)) for m in (1.0, 3.0, -1.0)]
    assert found.confidence == pytest.approx([(logistic[0] + logistic[1]) / 2, 0.5])
    assert found.variability == pytest.approx([(logistic[1] - logistic[0]) / 2, logistic[0] - 0.5])
    # sum (mu - m) / sum s: (0 - 2) / (2 sqrt 2) and (2 + 0) / (2 sqrt 2)
    assert found.suspicion == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])


def test_a_visit_is_compared_with_its_own_time() -> None:
    """Margins grow with the step, alike for all: nobody is suspect, although early visits are far below late ones."""
    steps = 4 * WINDOW
    visits = [(step, pair, 0, 1, 0.01 * step) for step in range(1, steps + 1) for pair in (step % 64,)]
    found = figures(paths(table(*visits)))
    own_time = np.abs(found.suspicion).max()
    mean = np.array([margin for *_, margin in visits])
    assert own_time < 0.5  # against the whole run the last of 64 pairs would still be near 0, the first visits at -1.7
    assert (mean.min() - mean.mean()) / mean.std() < -1.7


def test_margins_that_never_move_suspect_nobody() -> None:
    found = figures(paths(table((1, 0, 0, 1, 0.0), (1, 1, 0, 1, 0.0))))
    assert found.suspicion.tolist() == [0.0, 0.0]


def test_no_margins() -> None:
    assert len(paths(SCHEMA.empty_table())) == 0
    assert len(figures(paths(SCHEMA.empty_table())).visits) == 0


def test_area_under_the_curve_by_hand() -> None:
    """Positives 3, 2, 2 against negatives 2, 1: 3 > both, each 2 ties one and beats one: (2 + 1.5 + 1.5) / 6."""
    scores, positive = np.array([3.0, 2.0, 2.0, 2.0, 1.0]), np.array([True, True, True, False, False])
    assert area_under_curve(scores, positive) == pytest.approx(5 / 6)
    assert area_under_curve(-scores, positive) == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="positives and negatives"):
        area_under_curve(scores, np.ones(5, dtype=bool))
