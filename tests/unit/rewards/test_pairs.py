"""Figures of pairs by hand, and the slope against the sums written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from alignlab.rewards.intervals import Draws, wilson
from alignlab.rewards.judged import Judged
from alignlab.rewards.pairs import by_category, calibration, figures, length_slope, outcomes, signs

Made = Callable[..., Judged]
FEW = Draws(200)


def test_a_tie_is_half_right_or_wrong() -> None:
    assert outcomes(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]
    assert outcomes(np.array([2.0, 0.0, -1.0]), tie=0.0).tolist() == [1.0, 0.0, 0.0]


def test_accuracy_beside_length(made: Made) -> None:
    """Margins 1, -2, 0, 3: (1 + 0 + .5 + 1) / 4.  Length differences 2, 0, -1, 5: (1 + .5 + 0 + 1) / 4."""
    judged = made([[1, 0], [0, 2], [1, 1], [4, 1]], lengths=[[3, 1], [2, 2], [1, 2], [6, 1]])
    found = figures(judged, FEW)
    assert (found["pairs"], found["prompts"], found["ties"], found["margin"]) == (4, 4, 1, 0.5)
    assert found["accuracy"]["value"] == found["longer_is_better"]["value"] == 0.625
    # Pair by pair 0, -0.5, 0.5, 0: as often above as below, and at most half a point a pair.
    assert found["over_longer"]["value"] == 0
    assert -0.5 <= found["over_longer"]["low"] < 0 < found["over_longer"]["high"] <= 0.5


def test_the_difference_to_length_is_paired(made: Made) -> None:
    """Nine pairs that model and rule agree on, one that only the model has right: 0.1, and never below 0."""
    judged = made([[1, 0]] * 10, lengths=[[2, 1]] * 9 + [[1, 2]])
    found = figures(judged, FEW)["over_longer"]
    assert found["value"] == pytest.approx(0.1)
    assert found["low"] >= 0  # unpaired intervals of 1.0 and 0.9 would reach below


def test_categories_are_apart(made: Made) -> None:
    judged = made([[1, 0], [0, 1], [2, 0]], categories=["b", "a", "b"], prompts=[0, 0, 1])
    found = by_category(judged, FEW)
    assert list(found) == ["a", "b"]
    assert found["a"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": wilson(0, 1)[1], "method": "wilson"}
    assert (found["b"]["accuracy"]["value"], found["b"]["pairs"], found["b"]["prompts"]) == (1.0, 2, 2)


def test_slope_by_hand(made: Made) -> None:
    """x = 0, 1, 2, 3; y = 1, 2, 2, 4: slope 0.9, intercept 0.9; residuals .1, .2, -.7, .4.

    (X'X)^-1 = [[.7, -.3], [-.3, .2]].  Sums of x^2 e^2 = .04 + 1.96 + 1.44 = 3.44, of x e^2 = .04 + .98 + .48 = 1.5,
    of e^2 = .7.  Its entry for the slope: .09 * .7 - 2 * .3 * .2 * 1.5 + .04 * 3.44 = .0206; factor 4/3 * 3/2 = 2.
    """
    judged = made([[1, 0], [2, 0], [2, 0], [4, 0]], lengths=[[1, 1], [2, 1], [3, 1], [4, 1]])
    found = length_slope(judged)
    assert found is not None
    assert found["slope"] == pytest.approx(0.9)
    assert found["intercept"] == pytest.approx(0.9)
    assert found["standard_error"] == pytest.approx(math.sqrt(2 * 0.0206))
    assert found["t"] == pytest.approx(0.9 / math.sqrt(0.0412))


def test_slope_of_pairs_that_share_prompts_against_the_sums(made: Made) -> None:
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 12, 40)
    lengths = rng.integers(1, 50, (40, 2))
    rewards = rng.normal(size=(40, 2)) + rng.normal(size=12)[prompts][:, None] * [1, 0]
    found = length_slope(made(rewards.tolist(), lengths=lengths.tolist(), prompts=prompts.tolist()))
    assert found is not None
    x, y = (lengths[:, 0] - lengths[:, 1]).astype(float), rewards[:, 0] - rewards[:, 1]
    slope, intercept = np.polyfit(x, y, 1)
    assert found["slope"] == pytest.approx(slope)
    bread = np.linalg.inv(np.array([[40, x.sum()], [x.sum(), (x**2).sum()]]))
    meat = np.zeros((2, 2))
    for prompt in set(prompts.tolist()):
        score = np.zeros(2)
        for i in np.flatnonzero(prompts == prompt):
            score += np.array([1, x[i]]) * (y[i] - intercept - slope * x[i])
        meat += np.outer(score, score)
    groups = len(set(prompts.tolist()))
    variance = groups / (groups - 1) * 39 / 38 * (bread @ meat @ bread)[1, 1]
    assert found["standard_error"] == pytest.approx(math.sqrt(variance))


def test_no_slope_without_lengths(made: Made) -> None:
    assert length_slope(made([[1, 0]] * 5)) is None
    assert length_slope(made([[1, 0], [2, 0]], lengths=[[1, 2], [3, 1]])) is None


def test_signs_by_hand(made: Made) -> None:
    """Chosen 1, -1, 2, 0: two above zero (0 is not).  Rejected -1, -2, 1, -3: three below.  Both: the first alone."""
    found = signs(made([[1, -1], [-1, -2], [2, 1], [0, -3]]), FEW)
    assert found["chosen_positive"]["value"] == 0.5
    assert found["rejected_negative"]["value"] == 0.75
    assert found["both"]["value"] == 0.25
    assert (found["mean_chosen"], found["mean_rejected"]) == (0.5, -1.25)


def test_calibration_by_hand() -> None:
    """Confidence .75 (margin +-ln 3), 3 of 4 right: exact.  Confidence .9 (+-ln 9), 1 of 2 right: off by .4.

    Error 2/6 * .4.  Log loss: -ln of .75 (three times), .25, .9, .1.
    """
    a, b = math.log(3), math.log(9)
    found = calibration(np.array([a, a, a, -a, b, -b]))
    assert found.error == pytest.approx(0.4 * 2 / 6)
    assert found.log_loss == pytest.approx(-(3 * math.log(0.75) + math.log(0.25) + math.log(0.9) + math.log(0.1)) / 6)
    assert [(bin.pairs, bin.accuracy) for bin in found.bins] == [(4, 0.75), (2, 0.5)]
    assert [bin.confidence for bin in found.bins] == pytest.approx([0.75, 0.9])
    assert (found.bins[0].low, found.bins[0].high) == wilson(3, 4)


def test_ties_and_certainty_have_bins_of_their_own() -> None:
    found = calibration(np.array([0.0, 0.0, 800.0, -800.0]))
    assert [(bin.confidence, bin.accuracy) for bin in found.bins] == [(0.5, 0.5), (1.0, 0.5)]
    assert found.error == pytest.approx(0.25)
    assert found.log_loss == pytest.approx((2 * math.log(2) + 800) / 4)


def test_a_model_that_means_its_margins_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    size = rng.exponential(1.5, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-size))
    assert calibration(np.where(right, size, -size)).error < 0.015
    assert calibration(np.where(right, 3 * size, -3 * size)).error > 0.1
