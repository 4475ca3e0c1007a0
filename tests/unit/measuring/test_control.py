"""The control meter's arithmetic, by hand and against a naive twin."""

from __future__ import annotations

import numpy as np
import pytest

from alignlab.measuring import control
from alignlab.measuring.control import Reading
from alignlab.rewards.intervals import Draws

DRAWS = Draws(resamples=200, seed=0)


def test_the_grid_is_every_combination() -> None:
    assert control.grid({"a": [1, 2], "b": [5, 7, 9]}) == [
        {"a": 1, "b": 5}, {"a": 1, "b": 7}, {"a": 1, "b": 9}, {"a": 2, "b": 5}, {"a": 2, "b": 7}, {"a": 2, "b": 9},
    ]  # fmt: skip


def test_rank_correlation_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5, so sqrt(4.5 / 5)."""
    assert control.spearman(np.array([1, 3, 3, 9]), np.array([0, 1, 2, 3])) == pytest.approx((4.5 / 5) ** 0.5)
    assert control.spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert control.spearman(np.array([1, 1, 1]), np.array([3, 2, 1])) is None


def test_a_weight_is_a_repetition() -> None:
    generator = np.random.default_rng(0)
    left, right, weights = (
        generator.integers(0, 4, 30),
        generator.normal(size=30).round(1),
        generator.integers(0, 4, 30),
    )
    repeated = control.spearman(np.repeat(left, weights), np.repeat(right, weights))
    assert control.spearman(left, right, weights.astype(float)) == pytest.approx(repeated, abs=1e-12)


def test_the_front_by_hand() -> None:
    """(2, 2) beats (1, 2) and (0, 0); (3, 0) and (2, 2) do not beat each other; equal points stand side by side."""
    points = np.array([[2.0, 2.0], [1.0, 2.0], [3.0, 0.0], [0.0, 0.0], [2.0, 2.0]])
    assert control.nondominated(points) == [0, 2, 4]


def readings(follow: bool) -> list[Reading]:
    """Six prompts under a 3 x 2 grid; ``a`` does what it is asked or not, ``b`` never varies, ``a`` costs ``right``."""
    found = []
    for prompt in range(6):
        for condition in [{}, *control.grid({"a": [1, 2, 3], "b": [1, 2]})]:
            level = condition.get("a", 1.0) if follow else 2.0
            measured = {"a": level, "b": 1.0, "right": float(prompt < 6 - 2 * (level - 1))}
            found.append(Reading(f"prompt-{prompt}", condition, measured))
    return found


def test_full_control_and_its_price() -> None:
    found = control.meter(readings(follow=True), DRAWS)
    assert found.controlled == ["a", "b"]
    assert found.measures == ["a", "b", "right"]
    own = found.effect["a"]["a"]
    assert own is not None
    assert (own.value, own.low, own.high) == pytest.approx((1, 1, 1))
    assert found.effect["b"]["b"] is None  # it never varies
    assert found.effect["b"]["a"] is not None
    assert found.effect["b"]["a"].value == pytest.approx(0)  # a full grid: requests are independent
    leak = found.effect["a"]["right"]
    assert leak is not None
    assert leak.low <= leak.value < 0
    assert found.match["a"].value == 1
    assert found.match["b"].value == 0.5
    # right: levels 1, 2, 3 answer 6, 4, 2 of 6 prompts; the front of the one free measure is its best cells
    assert [cell.means["right"] for cell in found.cells] == pytest.approx([1, 1, 4 / 6, 4 / 6, 2 / 6, 2 / 6])
    assert found.control == pytest.approx(0.5)  # a follows fully (1), b never varies (0)
    assert found.means == pytest.approx({"a": 2, "b": 1, "right": (1 + 4 / 6 + 2 / 6) / 3})
    assert found.curve("a")[3.0] == pytest.approx({"a": 3, "b": 1, "right": 2 / 6})
    assert control.as_json(found)["curves"]["b"]["2"]["right"] == pytest.approx((1 + 4 / 6 + 2 / 6) / 3)
    assert found.front_measures == ["right"]
    assert [found.cells[place].requested for place in found.front] == [{"a": 1, "b": 1}, {"a": 1, "b": 2}]
    assert found.free is not None
    assert found.free.means["right"] == 1
    together = control.meter(readings(follow=True), DRAWS, front=["a", "right"])
    assert len(together.front) == 6  # more of one is less of the other


def test_no_control_is_no_correlation() -> None:
    found = control.meter(readings(follow=False), DRAWS)
    assert found.effect["a"]["a"] is None
    assert found.match["a"].value == pytest.approx(1 / 3)
    assert found.control == 0
    assert "    -" in control.table_text(found)[1]


def test_the_picture_is_a_png() -> None:
    assert control.plot(control.meter(readings(follow=True), DRAWS)).startswith(b"\x89PNG")
