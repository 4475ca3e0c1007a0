"""From scored answers to preference rows, by hand."""

from __future__ import annotations

import pytest

from alignlab.errors import ConfigError
from alignlab.measuring.rounds import Rated, Scored, preference_rows, rated_rows

ANSWERS = [
    Scored("a", "2 + 2?", ["5", "4", "four", "3"], [0.0, 1.0, 1.0, 0.0]),
    Scored("b", [{"role": "user", "content": "3 + 3?"}], ["6", "six"], [1.0, 1.0]),
    Scored("c", "4 + 4?", ["7", "8"], [0.2, 0.5]),
]


def test_best_against_worst_and_every_prompt_is_accounted_for() -> None:
    rows, account = preference_rows(ANSWERS, threshold=0.3)
    assert [row["id"] for row in rows] == ["a"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "2 + 2?"}]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "4"}]  # the first of the best
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "5"}]
    assert (rows[0]["score_chosen"], rows[0]["score_rejected"]) == (1.0, 0.0)
    assert account.as_json() == {
        "prompts": 3, "kept": 1, "dropped": {"tie": 1, "close": 1}, "mean_score": pytest.approx((2 + 2 + 0.7) / 8),
        "unscored": 0,
    }  # fmt: skip
    assert account.prompts == account.kept + sum(account.dropped.values())


def test_the_threshold_is_what_must_be_exceeded() -> None:
    assert [row["id"] for row in preference_rows(ANSWERS, threshold=0.29)[0]] == ["a", "c"]
    assert [row["id"] for row in preference_rows(ANSWERS)[0]] == ["a", "c"]


def test_labels_for_objectives_without_pairs() -> None:
    rows, account = preference_rows(ANSWERS, form="labels")
    assert [(row["id"], row["completion"][0]["content"], row["label"]) for row in rows] == [
        ("a#best", "4", True), ("a#worst", "5", False), ("c#best", "8", True), ("c#worst", "7", False),
    ]  # fmt: skip
    assert account.kept == 2


def test_what_has_no_score_is_no_candidate() -> None:
    answers = [
        Scored("a", "2 + 2?", ["", "4", "5"], [None, 1.0, 0.0]),
        Scored("b", "3 + 3?", ["", "6"], [None, 1.0]),
    ]
    rows, account = preference_rows(answers)
    assert [row["rejected"][0]["content"] for row in rows] == ["5"]
    assert (account.kept, dict(account.dropped), account.unscored) == (1, {"unscored": 1}, 2)
    assert account.mean_score == pytest.approx((1 + 0 + 1) / 3)


def test_the_rows_own_answer_is_a_candidate_but_was_not_sampled() -> None:
    answers = [
        Scored("a", "2 + 2?", ["5", "4"], [0.0, 1.0], own=True),
        Scored("b", "3 + 3?", ["6", "7", "8"], [1.0, 0.0, 0.5], own=True),
        Scored("c", "4 + 4?", ["8", "7"], [0.5, 0.0]),
        Scored("d", "5 + 5?", ["10", "9", "10"], [1.0, 0.0, 1.0], own=True),
        Scored("e", "6 + 6?", ["12", "9", ""], [1.0, 0.0, None], own=True),
    ]
    rows, account = preference_rows(answers)
    assert [row["chosen"][0]["content"] for row in rows] == ["4", "6", "8", "10", "12"]
    # a and d: as good as the best, though d's first sample is the one that is taken; c has none.
    assert account.as_json()["own"] == {"best": 2, "between": 1, "unscored": 1}
    assert account.mean_score == pytest.approx((0 + 1 + 0 + 0.5 + 0 + 1 + 0 + 1 + 0) / 9)


@pytest.mark.parametrize(("options", "said"), [({"form": "trees"}, "form 'trees'"), ({"threshold": -1.0}, "below 0")])
def test_what_makes_no_sense_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        preference_rows(ANSWERS, **options)


def test_all_answers_with_their_ratings_and_every_prompt_is_accounted_for() -> None:
    levels = {"steps": [1.0, 2.0, 3.0]}
    one, two, none = {"steps": 1.0, "right": 0.0}, {"steps": 2.0, "right": 1.0}, {"steps": 0.0, "right": 1.0}
    answers = [
        Rated("a", "2 + 2?", ["5", "2+2=4", "", "x"], [{"steps": 1.0}, {"steps": 2.0}, {"steps": 3.0}, {"steps": 1.0}],
              [one, two, None, none]),
        Rated("b", "3 + 3?", ["6", "six"], [{"steps": 1.0}] * 2, [two, two]),
        Rated("c", "4 + 4?", ["", "8", ""], [{"steps": 1.0}] * 3, [None, one, None]),
        Rated("d", "5 + 5?", ["x", "10"], [{"steps": 1.0}] * 2, [none, one]),
        Rated("e", "6 + 6?", ["13", "6+6=12"], [{"steps": 1.0}, {}], [one, two], own=True),
        Rated("f", "7 + 7?", ["13", "1"], [{"steps": 1.0}] * 2, [one, {"steps": 1.0, "right": 1.0}]),
    ]  # fmt: skip
    rows, account = rated_rows(answers, levels)
    assert [row["id"] for row in rows] == ["a", "e", "f"]  # f: equal levels, told apart by what is free
    assert rows[0] == {
        "id": "a", "prompt": [{"role": "user", "content": "2 + 2?"}],
        "completions": [{"response": "5", "ratings": one}, {"response": "2+2=4", "ratings": two}],
    }  # fmt: skip
    # Without a rating: one answer of a, two of c.  At level 0, beyond 1 to 3: one answer of a, one of d.
    assert account.as_json() == {
        "prompts": 6, "kept": 3, "dropped": {"tie": 1, "unscored": 1, "off_level": 1}, "unscored": 3, "off_level": 2,
        "own": {"rated": 1},
    }  # fmt: skip
