"""What an objective gets of a row, and why a row is left out."""

from __future__ import annotations

import pytest

from alignlab.data.examples import fault, prune, rating, to_examples
from alignlab.errors import DataError
from alignlab.types import Pair, Sample, Sequence, Unit

PROMPT = [{"role": "user", "content": "q"}]


def answer(text: str, **numbers: object) -> Sequence:
    return Sequence(PROMPT, [{"role": "assistant", "content": text}], **numbers)  # type: ignore[arg-type]


def texts(sample: Sample) -> list[str]:
    return [s.completion[0]["content"] for s in sample.sequences]  # type: ignore[index,call-overload]


def rated(*ratings: float | None) -> Sample:
    return Sample([answer(f"a{i}", scores={} if r is None else {"x": r}) for i, r in enumerate(ratings)])


def test_ratings_become_every_pair_of_unequal_ones() -> None:
    made = to_examples(rated(3, 1, None, 3, 2), Unit.PAIR)
    assert texts(made) == ["a0", "a1", "a3", "a4"]
    named = {(texts(made)[p.chosen], texts(made)[p.rejected]) for p in made.pairs}
    assert named == {("a0", "a1"), ("a0", "a4"), ("a3", "a1"), ("a3", "a4"), ("a4", "a1")}
    assert not any(p.absolute for p in made.pairs)
    assert all(p.absolute for p in to_examples(rated(1, 2), Unit.PAIR, absolute=True).pairs)


def test_four_unequal_ratings_are_six_pairs() -> None:
    assert len(to_examples(rated(1, 2, 3, 4), Unit.PAIR).pairs) == 6


def test_a_rating_is_the_mean_of_the_aspects() -> None:
    assert rating({"a": 1.0, "b": 4.0, "overall": 10.0}) == 2.5
    assert rating({"overall": 10.0}) == 10.0
    assert rating({}) is None


def test_ratings_of_different_prompts_make_no_pair() -> None:
    other = Sequence([{"role": "user", "content": "r"}], [{"role": "assistant", "content": "z"}], scores={"x": 5.0})
    sample = Sample([answer("a", scores={"x": 1.0}), other])
    assert fault(to_examples(sample, Unit.PAIR)) == "no_example"
    assert texts(to_examples(sample, Unit.SEQUENCE)) == ["a", "z"]


def test_own_pairs_are_kept_and_unused_sequences_go() -> None:
    sample = Sample([answer("a"), answer("b"), answer("c")], [Pair(2, 0, margin=1.0)])
    made = to_examples(sample, Unit.PAIR)
    assert texts(made) == ["a", "c"]
    assert [(p.chosen, p.rejected, p.margin) for p in made.pairs] == [(1, 0, 1.0)]


def test_demonstrations_are_what_nothing_beats() -> None:
    pair = Sample([answer("good"), answer("bad")], [Pair(0, 1)])
    assert texts(to_examples(pair, Unit.SEQUENCE)) == ["good"]
    ranked = Sample([answer("c"), answer("a"), answer("b")], [Pair(1, 2), Pair(1, 0), Pair(2, 0)])
    assert texts(to_examples(ranked, Unit.SEQUENCE)) == ["a"]
    assert texts(to_examples(rated(1, 3, 2, 3), Unit.SEQUENCE)) == ["a1"]
    assert texts(to_examples(Sample([answer("only")]), Unit.SEQUENCE)) == ["only"]
    undesired = to_examples(Sample([answer("x", label=False)]), Unit.SEQUENCE)
    assert fault(undesired) == "no_example"


def test_labels_from_pairs_ratings_and_labels() -> None:
    def labels(sample: Sample) -> list[tuple[str, bool | None]]:
        made = to_examples(sample, Unit.SEQUENCE, labels=True)
        assert not made.pairs
        return list(zip(texts(made), (s.label for s in made.sequences), strict=True))

    assert labels(Sample([answer("good"), answer("bad")], [Pair(0, 1)])) == [("good", True), ("bad", False)]
    assert labels(Sample([answer("x", label=False)])) == [("x", False)]
    assert labels(rated(3, 2, 1)) == [("a0", True), ("a2", False)]
    tree = Sample(
        [answer("r", label=True), answer("w", label=False), answer("v", label=False)], [Pair(0, 1), Pair(0, 2)]
    )
    assert labels(tree) == [("r", True), ("w", False), ("v", False)]


@pytest.mark.parametrize(("unit", "labels"), [(Unit.PAIR, False), (Unit.SEQUENCE, True)])
def test_the_wrong_kind_of_row_says_which_columns_are_needed(unit: Unit, labels: bool) -> None:
    with pytest.raises(DataError, match=r"row r7: the objective needs .* give prompt"):
        to_examples(Sample([answer("a")], id="r7"), unit, labels=labels)


def test_ties_are_no_example_and_no_error() -> None:
    assert fault(to_examples(rated(2, 2), Unit.PAIR)) == "no_example"
    assert fault(to_examples(rated(2), Unit.PAIR)) == "no_example"
    assert fault(to_examples(rated(2, 2), Unit.SEQUENCE, labels=True)) == "no_example"


@pytest.mark.parametrize(
    ("sequence", "reason"),
    [
        (answer("fine"), None),
        (answer(" \n"), "empty_response"),
        (Sequence(PROMPT, []), "no_target"),
        (Sequence(PROMPT, PROMPT), "no_target"),
        (Sequence(PROMPT, [{"role": "assistant", "content": "x", "weight": 0}]), "no_target"),
        (Sequence(PROMPT, [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]), None),
        (Sequence("p", "c"), None),
        (Sequence("p", " "), "empty_response"),
        (Sequence(input_ids=[1, 2], target_mask=[True, False]), "no_target"),
        (Sequence(input_ids=[1, 2], target_mask=[False, True]), None),
    ],
)
def test_faults_of_content(sequence: Sequence, reason: str | None) -> None:
    assert fault(Sample([sequence])) == reason


def test_an_identical_pair_is_a_fault_for_pairs_and_labels() -> None:
    same = Sample([answer("x"), answer("x")], [Pair(0, 1)])
    assert fault(to_examples(same, Unit.PAIR)) == "identical_pair"
    assert fault(to_examples(same, Unit.SEQUENCE, labels=True)) == "identical_pair"
    assert fault(to_examples(same, Unit.SEQUENCE)) is None
    empty = Sample([answer("x"), answer(" ")], [Pair(0, 1)])
    assert fault(to_examples(empty, Unit.PAIR)) == "empty_response"


def test_of_many_pairs_the_faulty_go_and_the_rest_stays() -> None:
    sample = Sample([answer("a"), answer("a"), answer(""), answer("b")], [Pair(0, 1), Pair(0, 2), Pair(0, 3)])
    assert fault(sample) is None
    kept, reasons = prune(sample)
    assert texts(kept) == ["a", "b"]
    assert [(p.chosen, p.rejected) for p in kept.pairs] == [(0, 1)]
    assert reasons == {"identical_pair": 1, "empty_response": 1}
