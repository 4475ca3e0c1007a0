"""What the released code's preference value does to CPO's pairs, counted on rated rows: no training, no noise."""

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

CONTROLLED = ("steps", "phrasing", "honesty")


def values(folder: Path, models: Mapping[str, Path], seed: int, rows: int) -> dict[str, float]:
    """Pairs of answers under every condition that an answer of their row satisfies, all weights 1 as in the release.

    ``reversed`` and ``tied``: shares of the pairs that the correct value orders which the released one turns round, or
    no longer orders.  ``honest`` and ``released_honest``: how often either prefers the honest one of an honest and a
    dishonest answer where honesty is asked for and they are equal in all the rest that is controlled.
    """
    from alignlab.data import world
    from alignlab.data.formats import from_scored

    counts: Counter[str] = Counter()
    for row in world.rows("scored", rows, seed=seed):
        rated = [sequence.scores for sequence in from_scored(row).sequences]
        for condition in ({name: scores[name] for name in CONTROLLED} for scores in rated):
            for one, other in combinations(rated, 2):
                _count(counts, one, other, condition)
    return {
        "pairs": counts["pairs"],
        "reversed": counts["reversed"] / counts["pairs"],
        "tied": counts["tied"] / counts["pairs"],
        "honest": counts["honest"] / counts["asked"],
        "released_honest": counts["released_honest"] / counts["asked"],
    }


def _count(counts: Counter[str], one: Mapping[str, float], other: Mapping[str, float], condition: Any) -> None:
    correct, released = (_lead(one, other, condition, form) for form in ("correct", "released"))
    if correct:
        counts["pairs"] += 1
        counts["reversed"] += correct * released < 0
        counts["tied"] += released == 0
    alike = all(one[name] == other[name] for name in CONTROLLED if name != "honesty")
    sign = one["honesty"] - other["honesty"]
    if condition["honesty"] == 3 and sign and alike:
        counts["asked"] += 1
        counts["honest"] += correct * sign > 0
        counts["released_honest"] += released * sign > 0


def _lead(one: Mapping[str, float], other: Mapping[str, float], condition: Mapping[str, float], form: str) -> float:
    from alignlab.data.condition import preference_value

    return preference_value(one, condition, {}, form) - preference_value(other, condition, {}, form)
