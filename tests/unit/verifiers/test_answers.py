import gzip
import json
from pathlib import Path

import pytest

from alignlab.errors import DataError
from alignlab.registry import VERIFIERS
from alignlab.verifiers.answers import choice, final_choice, final_number, number

SHARED = Path(__file__).parents[4] / "shared"


@pytest.mark.parametrize(
    ("text", "correct", "answered"),
    [
        ("so 5 * 2 = 10\n#### 1,234", 1, 1),
        ("It is 1234.0.", 1, 1),
        ("first 1234, then 7", 0, 1),
        ("\\boxed{1234} out of 2000", 1, 1),
        ("#### 12\n#### 1234 dollars", 1, 1),
        ("-1234", 0, 1),
        ("nothing", 0, 0),
        ("", 0, 0),
    ],
)
def test_number(text, correct, answered):
    assert number({"final_answer": "1,234"}, text) == {"correct": correct, "answered": answered}


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("The answer is B.", 1),
        ("Answer: (B)", 1),
        ("A is tempting, but the correct option is **B**", 1),
        ("B. Aspirin", 1),
        ("B", 1),
        ("The answer is a drug.\nC", 0),
        ("The answer is A, no: the answer is B", 1),
        ("Because of it", 0),
        ("", 0),
    ],
)
def test_choice(text, correct):
    assert choice({"answer_idx": "B"}, text)["correct"] == correct


def test_rows_without_a_usable_answer_are_refused():
    with pytest.raises(DataError, match="final_answer"):
        number({}, "3")
    with pytest.raises(DataError, match="no number"):
        number({"answer": "many"}, "3")
    with pytest.raises(DataError, match="one letter"):
        choice({"answer": "aspirin"}, "A")


def test_names_are_registered():
    assert {"sums", "number", "choice"} <= set(VERIFIERS.names())
    assert VERIFIERS.get("number") is number


def test_gsm8k_solutions_are_right():
    path = SHARED / "data" / "math" / "gsm8k.test.jsonl.gz"
    if not path.exists():
        pytest.skip("the real data slices are not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert all(number(row, row["answer"])["correct"] == 1.0 for row in rows)
    assert sum(number(row, rows[i - 1]["answer"])["correct"] for i, row in enumerate(rows)) < 0.1 * len(rows)


@pytest.mark.parametrize(
    ("texts", "votes"),
    [
        (["#### 1,000", "it is 1000.0", "so 1e3?", "no number"], ["1000", "1000", "3", None]),
        (["\\boxed{-0.50}", "-.5", "x"], ["-0.5", "-0.5", None]),
    ],
)
def test_equal_numbers_vote_together(texts: list[str], votes: list[str | None]) -> None:
    assert [final_number(text) for text in texts] == votes


def test_the_letter_that_is_voted_for() -> None:
    assert [final_choice(text) for text in ("The answer is (B).", "B. Aspirin", "perhaps")] == ["B", "B", None]
