"""Win rates and ratings, by hand."""

from __future__ import annotations

import pytest

from alignlab.judges.figures import Compared, difference, rankings, ratings, win_rate
from alignlab.judges.templates import Ranking
from alignlab.rewards.intervals import Draws, wilson

DRAWS = Draws(500, 0)


def test_win_rate_over_both_orders() -> None:
    found = win_rate(
        [
            Compared(1.0, 1.0, (10, 20)),  # the first side wins in both orders
            Compared(1.0, 0.0, (10, 20)),  # each order prefers what is shown first: half a win
            Compared(0.0, 0.0, (5, 30)),
            Compared(0.5, 1.0, (40, 8)),  # a tie and a win: three quarters
            Compared(0.5, 0.5, (7, 7), asked=False),
            Compared(None, 1.0, (1, 1)),
        ],
        DRAWS,
    )
    assert found["win_rate"]["value"] == pytest.approx((1 + 0.5 + 0 + 0.75 + 0.5) / 5)
    assert (found["wins"], found["ties"], found["losses"]) == (2, 2, 1)
    assert (found["prompts"], found["incomplete"], found["unparsable"], found["identical"]) == (5, 1, 1, 1)
    # Of the four that were asked about and read, two say another thing in the other order.
    assert found["position"]["changed"]["value"] == 0.5
    # Shown first: the first side in the forward order, the second side in the swapped one.  Decided verdicts, for the
    # one shown first: 1 (a), 0 (a), 1 (b), 1 (b), 0 (c), 1 (c), 0 (d, swapped), 0 (the one that was read of the last).
    assert (found["position"]["shown_first_wins"], found["position"]["verdicts"]) == (4 / 8, 8)
    # Decided: 10 beats 20, 30 beats 5, 40 beats 8; the longer one wins in two of three.
    assert found["length"]["winner"] == pytest.approx((10 + 30 + 40) / 3)
    assert found["length"]["loser"] == pytest.approx((20 + 5 + 8) / 3)
    assert found["length"]["longer_wins"]["value"] == pytest.approx(2 / 3)


def test_without_ties_the_interval_is_wilson_s() -> None:
    found = win_rate([Compared(1.0, 1.0, (1, 2))] * 7 + [Compared(0.0, 0.0, (1, 2))] * 3, DRAWS)
    low, high = wilson(7, 10)
    assert found["win_rate"] == {"value": 0.7, "low": low, "high": high, "method": "wilson"}


def test_nothing_read_is_no_figure() -> None:
    found = win_rate([Compared(None, None, (1, 2))], DRAWS)
    assert found["win_rate"] is None
    assert (found["prompts"], found["incomplete"], found["unparsable"]) == (0, 1, 2)
    assert ratings([None], [3], DRAWS)["mean"] is None


def test_ratings_and_their_difference() -> None:
    found = ratings([2.0, None, 4.0, 9.0], [10, 20, 30, 40], DRAWS)
    assert (found["mean"]["value"], found["prompts"], found["unparsable"]) == (5.0, 3, 1)
    assert found["distribution"] == {"2": 1, "4": 1, "9": 1}
    assert found["length_correlation"] == pytest.approx(1.0)
    other = difference([2.0, None, 4.0, 9.0], [1.0, 5.0, None, 6.0], DRAWS)
    assert (other["prompts"], other["difference"]["value"]) == (2, 2.0)  # (2 - 1 + 9 - 6) / 2


def test_rankings_by_side() -> None:
    agree = Ranking((5.0, 3.0, 1.0), (1, 2, 3))
    other = Ranking((3.0, 4.0, 2.0), (2, 1, 3))
    odd = Ranking((1.0, 5.0, 3.0), (1, 2, 3))  # ranks the lowest score first
    found = rankings(
        [(agree, agree), (agree, other), (odd, odd), (None, agree)], [(3, 2, 1)] * 4, ["a", "b", "c"], DRAWS
    )
    assert (found["prompts"], found["incomplete"], found["unparsable"], found["contradictions"]) == (3, 1, 1, 2)
    assert found["position"]["changed"]["value"] == pytest.approx(1 / 3)
    assert found["sides"]["a"]["score"]["value"] == pytest.approx((5 + 4 + 1) / 3)
    assert found["sides"]["a"]["rank"]["value"] == pytest.approx((1 + 1.5 + 1) / 3)
    assert found["win_rates"]["b"]["win_rate"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["win_rates"]["c"]["win_rate"]["value"] == 1.0
