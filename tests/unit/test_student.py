"""Student's t: its points against printed tables, intervals by hand, and how often a prediction interval holds."""

from __future__ import annotations

import math
import random

import pytest

from alignlab import student


@pytest.mark.parametrize(
    ("probability", "degrees", "printed"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.975, 9, 2.262), (0.975, 1000, 1.962),
     (0.995, 1, 63.657), (0.995, 2, 9.925), (0.995, 4, 4.604), (0.995, 19, 2.861), (0.9995, 3, 12.924)],
)  # fmt: skip
def test_points_are_those_of_the_tables(probability: float, degrees: int, printed: float) -> None:
    assert student.point(probability, degrees) == pytest.approx(printed, abs=5.01e-4)


def test_the_interval_of_a_mean_by_hand() -> None:
    """Values 1, 2, 6: mean 3, s = sqrt((4 + 1 + 9) / 2) = sqrt(7), half width 4.3027 x sqrt(7) / sqrt(3)."""
    found = student.of_mean([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.half == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert (found.low, found.high) == (3.0 - found.half, 3.0 + found.half)


def test_the_interval_of_one_more_by_hand() -> None:
    """The same values: half width 9.9248 x sqrt(7) x sqrt(1 + 1/3) = 30.32."""
    found = student.of_next([1.0, 2.0, 6.0])
    assert found.half == pytest.approx(9.92484 * math.sqrt(7) * math.sqrt(4 / 3), rel=1e-5)


def test_how_often_one_more_draw_is_outside() -> None:
    """4000 times 5 + 1 normal draws: 1 % are outside, within three deviations sqrt(0.01 x 0.99 / 4000) = 0.0016; of the
    five's least and greatest, one in three is."""
    rng, times = random.Random(0), 4000
    outside = beyond = 0
    for _ in range(times):
        *five, sixth = (rng.gauss(0, 1) for _ in range(6))
        found = student.of_next(five)
        outside += not found.low <= sixth <= found.high
        beyond += not min(five) <= sixth <= max(five)
    assert outside / times == pytest.approx(0.01, abs=0.0048)
    assert beyond / times == pytest.approx(1 / 3, abs=0.0224)


@pytest.mark.parametrize(("probability", "degrees"), [(0.975, 0), (0.5, 3), (1.0, 3)])
def test_what_has_no_point(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no point"):
        student.point(probability, degrees)
