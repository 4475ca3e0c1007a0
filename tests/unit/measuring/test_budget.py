"""Sums over a sample of steps, and hours; that counted steps are those of a run is tests/unit/verbs/test_plan.py's."""

from __future__ import annotations

import numpy as np
import pytest

from alignlab.errors import ConfigError
from alignlab.measuring.budget import Estimate, StepWork, Work, choose_steps, hours, peak_of


def work_of(tokens: np.ndarray, planned: list[int]) -> Work:
    steps = [StepWork(1, int(tokens[step]), 0, 0, 0, 0.0, 0.0, 0.0, 0.0) for step in planned]
    return Work(len(tokens), planned, steps, 1.0, Estimate(0.0, 0.0))


def test_the_steps_that_are_counted() -> None:
    assert choose_steps(5, 0, 0) == choose_steps(5, 5, 0) == choose_steps(5, 9, 7) == [0, 1, 2, 3, 4]
    for seed in range(20):
        chosen = choose_steps(100, 10, seed)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 10
        assert chosen[-1] == 99
    assert choose_steps(100, 10, 1) == choose_steps(100, 10, 1) != choose_steps(100, 10, 2)
    assert choose_steps(100, 1, 0)[-1] == 99, "the last step, and one of the others"


def test_a_sample_has_no_bias_and_its_error_is_what_it_says() -> None:
    """200 steps of some 1,000 tokens and a last one of 10; samples of 20 in 400 seeds.

    The mean of 400 estimates has a standard error of a twentieth of one's: their bias must be within four of those.  By
    the normal law 95% of all lie within 1.96 of the errors that they state; 400 draws give 0.95 +- 4 x 0.011, and a
    sample of 19 knows its own deviation a little less well: at least 0.88.
    """
    rng = np.random.default_rng(0)
    tokens = np.concatenate((rng.integers(600, 1400, 200), [10]))
    found = [work_of(tokens, choose_steps(201, 20, seed)).total("tokens") for seed in range(400)]
    away = np.array([estimate.total for estimate in found]) - tokens.sum()
    errors = np.array([estimate.error for estimate in found])
    assert abs(away.mean()) < 4 * errors.mean() / 20
    assert 0.88 < np.mean(abs(away) < 1.96 * errors) < 0.99


def test_all_steps_are_no_estimate() -> None:
    tokens = np.array([3, 5, 4])
    assert work_of(tokens, [0, 1, 2]).total("tokens") == Estimate(12.0, 0.0)


def test_a_gpu_by_the_end_of_its_name() -> None:
    assert peak_of("H100") == peak_of("nvidia h100") == ("NVIDIA H100", 989e12)
    assert peak_of("H100 PCIe") == ("NVIDIA H100 PCIe", 756e12)
    assert peak_of("mi300x")[1] == 1307e12
    for unknown in ("100", "V100", "RTX 4090"):
        with pytest.raises(ConfigError, match=f"gpu: {unknown} is not known; known are A100, "):
            peak_of(unknown)


def test_hours() -> None:
    """8 devices of 1e15 a second at 40% do 3.2e15 x 3600 in an hour."""
    assert hours(2 * 3.2e15 * 3600, 8, 1e15, 0.4) == pytest.approx(2.0)
