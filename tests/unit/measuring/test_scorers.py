"""Who scores a text, by name; and what a row itself answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignlab.config import RootConfig
from alignlab.data import world
from alignlab.data.formats import to_sample
from alignlab.data.rows import Row
from alignlab.errors import ConfigError
from alignlab.measuring.scorers import make_scorer, means, named_scorers
from alignlab.measuring.verification import Answer, Prompt, prompt_of
from alignlab.types import Sample

CONFIG = RootConfig()
ANSWER = Answer(
    Prompt("a", "How many?", verify={"kind": "number", "answer": "4"}),
    ["It is 4", "none", "4"],
    [{"correct": 1.0, "brevity": 0.1}, {"correct": 0.0, "brevity": 0.2}, {"correct": 1.0, "brevity": 0.9}],
)


def test_the_rows_verifier_and_a_registered_one() -> None:
    assert make_scorer("verifier", CONFIG)([ANSWER]) == [[1.0, 0.0, 1.0]]
    assert make_scorer("verifier", CONFIG, "brevity")([ANSWER]) == [[0.1, 0.2, 0.9]]
    assert make_scorer("verifier:brevity", CONFIG)([ANSWER]) == [[0.1, 0.2, 0.9]]
    answered = make_scorer("number:answered", CONFIG)
    assert answered([ANSWER]) == [[1.0, 0.0, 1.0]]  # asked anew: what the answers were given is not looked at
    assert (answered.identity, answered.is_verifier) == ("number:answered", True)


def test_a_measure_that_is_not_taken() -> None:
    with pytest.raises(ConfigError, match="measure=beauty: the verifier measures correct, brevity"):
        make_scorer("verifier:beauty", CONFIG)([ANSWER])
    bare = Answer(ANSWER.prompt, ["4"], [{}])
    with pytest.raises(ConfigError, match="nothing: name one"):
        make_scorer("verifier", CONFIG)([bare])


def test_several_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = named_scorers(["right=number", "number:answered"], CONFIG)
    assert {name: scorer.identity for name, scorer in found.items()} == {
        "right": "number:correct",
        "number:answered": "number:answered",
    }
    with pytest.raises(ConfigError, match="two scorers are called 'a'"):
        named_scorers(["a=number", "a=choice"], CONFIG)
    # A folder that is there is never taken for a name and a scorer.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=number").mkdir()
    (tmp_path / "x=number" / "run.yaml").write_text("")
    with pytest.raises(ConfigError, match="x=number has no finished model"):
        named_scorers(["x=number"], CONFIG)


def test_the_mean_is_over_what_has_a_score() -> None:
    assert means([[1.0, None], [0.0, 2.0]]) == 1.0
    assert means([[None]]) is None


ASKED = [{"role": "user", "content": "2+2?"}]


def understood(row: dict) -> Sample:
    return to_sample(Row("rows.jsonl", 1, row))


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": ASKED, "chosen": [said("4")], "rejected": [said("5")]}, "4"),
        ({"messages": [*ASKED, said("4")]}, "4"),
        ({"prompt": "2+2=", "completion": "4"}, "4"),
        ({"prompt": "2+2?", "completions": [{"response": "5", "score": 1}, {"response": "4", "score": 9}]}, "4"),
        ({"prompt": "2+2?", "completions": [{"response": "5"}, {"response": "4"}]}, "5"),  # nobody says which is better
        ({"prompt": ASKED}, None),
    ],
)
def test_what_a_row_itself_answers(row: dict, expected: str | None) -> None:
    assert prompt_of(understood({"id": "a", **row})).answer == expected


def test_a_tree_answers_its_first_turn() -> None:
    first, second = world.rows("trees", 2, seed=3)
    assert prompt_of(understood(first)).answer == first["chosen"]
    assert prompt_of(understood(second)).answer == second["chosen"]  # the row is about the second turn


def test_the_rating_says_which_is_best() -> None:
    row = {"id": "a", "prompt": "2+2?", "completions": [
        {"response": "four", "annotations": {"style": 5, "truth": 2}},
        {"response": "4", "annotations": {"style": 1, "truth": 3}},
    ]}  # fmt: skip
    assert prompt_of(understood(row)).answer == "four"  # means 3.5 and 2
    assert prompt_of(understood(row), ["truth"]).answer == "4"
