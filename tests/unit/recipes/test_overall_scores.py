"""The judge of recipes/ultrafeedback: what the bug of the first release does to the order of a row's answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignlab.configuration.plugins import load
from alignlab.data import world
from alignlab.registry import FORMATS

JUDGE = Path(__file__).resolve().parents[3] / "recipes" / "ultrafeedback" / "judge.py"
ROWS = list(world.rows("scored", 300, seed=7))


@pytest.fixture(scope="module", autouse=True)
def _formats() -> None:
    load([str(JUDGE)])


def scores(name: str) -> Iterator[dict[str, float]]:
    for row in ROWS:
        yield from (sequence.scores for sequence in FORMATS.get(name)(row).sequences)


def share(name: str) -> float:
    """Couples of one problem, a right and a wrong answer: how often the right one has the higher overall score."""
    right: list[float] = []
    for row in ROWS:
        rated = [s.scores for s in FORMATS.get(name)(row).sequences]
        for good in (r for r in rated if r["correctness"] == 3):
            for bad in (r for r in rated if r["correctness"] == 1):
                right.append(1.0 if good["overall"] > bad["overall"] else 0.5 * (good["overall"] == bad["overall"]))
    return sum(right) / len(right)


def test_a_one_becomes_a_ten_and_nothing_else_changes() -> None:
    meant, released = list(scores("overall_fixed")), list(scores("overall_released"))
    assert {one["overall"] for one in meant} == set(range(1, 11))
    assert min(one["overall"] for one in released) == 2
    for before, after in zip(meant, released, strict=True):
        assert after["overall"] == (10 if before["overall"] == 1 else before["overall"])
        assert {k: v for k, v in after.items() if k != "overall"} == {k: v for k, v in before.items() if k != "overall"}


def test_the_score_is_the_mean_of_the_aspects_on_another_scale() -> None:
    """1 + 9 (mean - 1) / 2 off by a standard deviation of 1: over 1,200 answers the mean error is within 0.1."""
    off = []
    for one in scores("overall_fixed"):
        mean = sum(one[name] for name in ("steps", "phrasing", "honesty", "correctness")) / 4
        off.append(one["overall"] - (1 + 9 * (mean - 1) / 2))
    assert abs(sum(off) / len(off)) < 0.1
    assert 0.8 < (sum(value**2 for value in off) / len(off)) ** 0.5 < 1.2


def test_the_bug_costs_order_and_the_broken_setting_turns_it() -> None:
    assert share("overall_fixed") > 0.88
    assert 0.7 < share("overall_released") < 0.86
    assert share("overall_broken") < 0.42


def test_every_call_gives_the_same_score() -> None:
    row: dict[str, Any] = ROWS[0]
    assert [s.scores for s in FORMATS.get("overall_fixed")(row).sequences] == [
        s.scores for s in FORMATS.get("overall_fixed")(row).sequences
    ]
