"""Choosing among sampled answers, by hand."""

from __future__ import annotations

import pytest

from alignlab.errors import DataError
from alignlab.measuring.reranking import Pool, majority, table_text, ways
from alignlab.rewards.intervals import Draws

DRAWS = Draws(200, 0)
POOLS = [
    Pool([1, 0, 0, 0], {"rm": [2.0, 1.0, 0.0, -1.0]}, ["7", "8", "8", None], greedy=0.0),
    Pool([1, 1, 0, 0], {"rm": [0.0, 1.0, 2.0, None]}, ["7", "7", "8", "9"], greedy=1.0),
]


def test_every_way_by_hand() -> None:
    found = ways(POOLS, DRAWS)
    values = {name: figure["value"] for name, figure in found["ways"].items()}
    assert values == {
        "greedy": pytest.approx(1 / 2),
        "random": pytest.approx((1 / 4 + 2 / 4) / 2),
        "majority": pytest.approx((0 + 1) / 2),  # "8" twice and wrong; "7" twice and right
        "best/rm": pytest.approx((1 + 0) / 2),
        "oracle": 1.0,
    }
    assert found["differences"]["best/rm - greedy"]["value"] == pytest.approx(0.0)  # +1 and -1
    assert found["differences"]["best/rm - majority"]["value"] == pytest.approx(0.0)
    assert found["differences"]["oracle - greedy"]["value"] == pytest.approx(1 / 2)
    # Best of two, over the six couples of each pool: the first pool takes its right answer in the three that hold it.
    # The second: {0,1} {0,2} {0,3} {1,2} {1,3} {2,3} give 1, 0, 1, 0, 1, 0.
    assert found["curves"]["rm"] == {
        "1": pytest.approx((1 / 4 + 1 / 2) / 2), "2": pytest.approx((3 / 6 + 3 / 6) / 2), "4": pytest.approx(0.5),
    }  # fmt: skip
    assert any(line.startswith("best/rm") for line in table_text(found))


def test_an_answer_without_a_score_is_the_last_to_be_chosen() -> None:
    pool = Pool([1, 0], {"rm": [None, -50.0]})
    assert ways([pool], DRAWS)["ways"]["best/rm"]["value"] == 0.0
    nothing = Pool([1, 0], {"rm": [None, None]})
    assert ways([nothing], DRAWS)["ways"]["best/rm"]["value"] == 0.5  # each as likely as the other


def test_without_greedy_and_votes_there_is_the_rest() -> None:
    found = ways([Pool([1, 0], {"rm": [1.0, 0.0]})], DRAWS)
    assert list(found["ways"]) == ["random", "best/rm", "oracle"]
    assert found["differences"]["best/rm - random"]["value"] == 0.5


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["a", "b", "b"], 0.0),
        (["a", "b", "c"], 1 / 3),  # a tie of three: each as likely
        (["a", None, None], 1.0),  # what says nothing has no vote
        ([None, None, None], 1 / 3),
    ],
)
def test_majority(votes: list[str | None], expected: float) -> None:
    assert majority([1, 0, 0], votes) == pytest.approx(expected)


def test_pools_of_two_sizes_are_refused() -> None:
    with pytest.raises(DataError, match=r"one size, these have \[1, 2\]"):
        ways([Pool([1]), Pool([1, 0])], DRAWS)
    with pytest.raises(DataError, match="none"):
        ways([], DRAWS)


def test_intervals_draw_prompts() -> None:
    """Ten copies of a pool with itself are no spread; half right and half wrong prompts are."""
    same = ways([Pool([1, 0])] * 10, DRAWS)["ways"]["random"]
    assert (same["low"], same["high"]) == (0.5, 0.5)
    mixed = ways([Pool([1, 1]), Pool([0, 0])] * 20, Draws(2000, 1))["ways"]["random"]
    # 40 prompts of variance 1/4: standard error sqrt(0.25 / 40) = 0.079
    assert mixed["low"] == pytest.approx(0.5 - 1.96 * 0.079, abs=0.03)
    assert mixed["high"] == pytest.approx(0.5 + 1.96 * 0.079, abs=0.03)
