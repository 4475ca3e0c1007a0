"""Final answers as mathematics, and where that differs from comparing numbers."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from alignlab.errors import ConfigError, DataError
from alignlab.registry import VERIFIERS
from alignlab.verifiers.answers import number
from alignlab.verifiers.mathematics import equal

pytest.importorskip("math_verify")
SHARED = Path(__file__).parents[4] / "shared"


@pytest.mark.parametrize(
    ("wanted", "text", "mathematics", "decimal"),
    [
        ("1,234", "#### 1,234", 1, 1),
        ("18", "He makes 9 * 2 = $18 every day.", 1, 1),
        ("18", "so #### 18\nNote that 3 are left.", 1, 1),
        ("3", "first 3, then 7", 0, 0),
        # Equal, but another number is written: a fraction, a root, a set, a decimal to six digits.
        ("1/2", "The answer is 0.5", 1, 0),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", 1, 0),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", 1, 0),
        ("0.333333", "\\boxed{1/3}", 1, 0),
        ("x+1", "\\boxed{x+2-1}", 1, 0),
        # The last number is the same, the answer is not.
        ("x+1", "\\boxed{x^2+1}", 0, 1),
        ("50", "\\boxed{50\\%}", 0, 1),
        ("(1,2)", "\\boxed{(0, 2)}", 0, 1),
        # Words after the answer: "the answer is" counts, the last number does not.
        ("5", "The answer is 5. Check: 7 would be too much.", 1, 0),
        ("5 dollars", "\\boxed{5}", 0, 1),  # a unit in the row's answer: keep it out of the row
    ],
)
def test_beside_number(wanted: str, text: str, mathematics: int, decimal: int) -> None:
    row = {"answer": wanted}
    assert equal(row, text) == {"correct": mathematics, "answered": 1}
    assert number(row, text)["correct"] == decimal


def test_what_number_cannot_take() -> None:
    row = {"final_answer": "\\text{Tuesday}"}
    assert equal(row, "\\boxed{\\text{Tuesday}}")["correct"] == 1
    with pytest.raises(DataError, match="holds no number"):
        number(row, "\\boxed{\\text{Tuesday}}")


def test_no_answer_is_not_answered() -> None:
    assert equal({"answer": "12"}, "I do not know.") == {"correct": 0, "answered": 0}
    with pytest.raises(DataError, match="final_answer"):
        equal({}, "3")
    with pytest.raises(DataError, match="cannot be read"):
        equal({"answer": " "}, "3")


def test_it_is_registered_and_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert VERIFIERS.get("math") is equal
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'alignlab\[math\]'"):
        equal({"answer": "3"}, "3")


def test_gsm8k_solutions_are_right() -> None:
    path = SHARED / "data" / "math" / "gsm8k.test.jsonl.gz"
    if not path.exists():
        pytest.skip("the real data slices are not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:60]
    assert all(equal(row, row["answer"])["correct"] == 1.0 for row in rows)
    assert sum(equal(row, rows[i - 1]["answer"])["correct"] for i, row in enumerate(rows)) < 0.1 * len(rows)
