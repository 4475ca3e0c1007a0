"""What rows mean: one test a convention, and every folder of real rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignlab.data.formats import recognise, to_sample
from alignlab.data.rows import Row, read_rows
from alignlab.errors import ConfigError, DataError
from alignlab.registry import FORMATS
from alignlab.types import Sample, Sequence

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def read(value: dict[str, Any], format: str = "auto", **options: Any) -> Sample:
    return to_sample(Row("rows.jsonl", 7, value), format, **options)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_messages_and_sharegpt_mean_the_same() -> None:
    openai = read({"messages": [user("q"), said("a"), user("r"), said("b"), user("bye")], "id": 3, "source": "s"})
    turns = [("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")]
    sharegpt = read({"conversations": [{"from": who, "value": text} for who, text in turns]})
    for sample in (openai, sharegpt):
        assert sample.sequences == [Sequence([user("q")], [said("a"), user("r"), said("b")])]
    assert (openai.id, openai.source, sharegpt.id) == ("3", "s", "rows.jsonl:7")


def test_tool_turns_are_kept_in_one_form() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            user("q"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            said("two"),
        ],
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
    }
    sample = read(row)
    turns = sample.sequences[0].completion
    assert isinstance(turns, list)
    assert turns[0]["content"] == ""
    assert turns[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert sample.tools == [{"type": "function", "function": {"name": "add"}}]
    share = [
        ("human", "q"),
        ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        ("observation", "2"),
        ("gpt", "two"),
    ]
    other = read({"conversations": [{"from": who, "value": text} for who, text in share]}).sequences[0].completion
    assert isinstance(other, list)
    assert other[0]["tool_calls"][0]["function"] == turns[0]["tool_calls"][0]["function"]
    assert other[1]["role"] == "tool"


def test_plain_text_stays_plain() -> None:
    assert read({"prompt": "p", "completion": "c"}).sequences == [Sequence("p", "c")]
    assert read({"text": "all"}).sequences == [Sequence("", "all")]
    unpaired = read({"prompt": "p", "completion": "c", "label": False}).sequences
    assert unpaired == [Sequence("p", "c", label=False)]


def test_alpaca_is_one_exchange() -> None:
    row = {"instruction": "i", "input": "n", "output": "o", "system": "s"}
    assert read(row).sequences == [Sequence([{"role": "system", "content": "s"}, user("i\n\nn")], [said("o")])]
    assert read({"instruction": "i", "input": "", "output": "o"}).sequences[0].prompt == [user("i")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [said("a")], "rejected": [said("b")]},
        {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {"prompt": "q", "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {"prompt": [user("q")], "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"trajectory": [{"from": "user", "value": "q"}], "chosen": "a", "rejected": "b"},
    ],
)
def test_every_way_to_write_a_pair_means_the_same(row: dict[str, Any]) -> None:
    sample = read(row)
    assert [(s.prompt, s.completion) for s in sample.sequences] == [
        ([user("q")], [said("a")]),
        ([user("q")], [said("b")]),
    ]
    assert [(p.chosen, p.rejected) for p in sample.pairs] == [(0, 1)]
    assert sample.pairs[0].absolute == ("trajectory" in row)


def test_plain_pairs_without_a_prompt_share_their_beginning() -> None:
    sample = read({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert [(s.prompt, s.completion) for s in sample.sequences] == [
        ("The sky is", " blue."),
        ("The sky is", " green."),
    ]


def test_transcripts_that_part_early_keep_their_own_turns() -> None:
    row = {
        "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: more\n\nAssistant: c",
        "rejected": "\n\nHuman: q\n\nAssistant: b\nsecond line\n\nHuman: more\n\nAssistant: d",
    }
    chosen, rejected = read(row).sequences
    assert chosen.prompt == rejected.prompt == [user("q")]
    assert chosen.completion == [said("a"), user("more"), said("c")]
    assert rejected.completion == [said("b\nsecond line"), user("more"), said("d")]


def test_extra_numbers_of_a_pair() -> None:
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "score_chosen": 8.0,
        "score_rejected": None,
        "margin": 1.5,
        "absolute": True,
    }
    sample = read(row)
    assert [s.scores for s in sample.sequences] == [{"overall": 8.0}, {}]
    assert (sample.pairs[0].margin, sample.pairs[0].absolute) == (1.5, True)
    assert read({"prompt": "p", "chosen": "a", "rejected": "b"}, absolute=True).pairs[0].absolute


def test_ratings_of_every_source() -> None:
    row = {
        "instruction": "q",
        "completions": [
            {
                "response": "a",
                "annotations": {"helpfulness": {"Rating": "4", "Rationale": "x"}, "honesty": {"Rating": "N/A"}},
                "overall_score": 7.5,
            },
            {"response": "b", "annotations": {"helpfulness": 2, "honesty": 1}},
            {"response": "c", "scores": {"honesty": "3"}},
            {"response": "d"},
        ],
    }
    assert [s.scores for s in read(row).sequences] == [
        {"helpfulness": 4.0, "overall": 7.5},
        {"helpfulness": 2.0, "honesty": 1.0},
        {"honesty": 3.0},
        {},
    ]
    labels = ["1_full_compliance", "2_full_refusal", "3_partial_refusal"]
    for safe, name, wanted in ((True, "helpfulness", [1.0, 0.0, 0.5]), (False, "harmlessness", [0.0, 1.0, 0.5])):
        xstest = {
            "instruction": "q",
            "prompt_is_safe": safe,
            "completions": [{"response": "a", "final_label": x} for x in labels],
        }
        assert [s.scores[name] for s in read(xstest).sequences] == wanted
    judged = [
        {"a": 0, "b": 1, "preferred": "tie"},
        {"a": 0, "b": 2, "preferred": "b"},
        {"a": 1, "b": 2, "preferred": "a"},
    ]
    pairs = read({**row, "pairwise": judged}).pairs
    assert [(p.chosen, p.rejected) for p in pairs] == [(2, 0), (1, 2)]


def test_trajectories_become_siblings_by_their_context() -> None:
    wrong = user("Observation:\nYour answer is wrong.\nTry again.")
    row = {
        "prompt": "q",
        "trajectories": [
            {"success": True, "turns": [said("right")]},
            {"success": True, "turns": [said("wrong"), wrong, said("fixed")]},
            {"success": False, "turns": [said("wrong"), wrong, said("worse")]},
            {"success": False, "turns": [said("tool"), user("2"), said("bad"), user("more")]},
            {"success": True, "turns": [said("flaky")]},
            {"success": False, "turns": [said("flaky")]},
        ],
    }
    sample = read(row)
    found = {
        (
            len(sample.sequences[p.chosen].prompt or ""),
            sample.sequences[p.chosen].completion[0]["content"],
            sample.sequences[p.rejected].completion[0]["content"],
        )  # type: ignore[index,call-overload]
        for p in sample.pairs
    }
    assert found == {(1, "right", "wrong"), (3, "fixed", "worse")}
    assert all(pair.absolute for pair in sample.pairs)
    actions = {s.completion[0]["content"]: s.label for s in sample.sequences}  # type: ignore[index,call-overload]
    assert actions == {"right": True, "wrong": False, "fixed": True, "worse": False, "bad": False}
    for pair in sample.pairs:
        assert sample.sequences[pair.chosen].prompt == sample.sequences[pair.rejected].prompt


def test_solutions_and_ranked_replies_are_trees_too() -> None:
    solved = [
        {"response": "a", "correct": True},
        {"response": "b", "correct": False},
        {"response": "c", "correct": False},
    ]
    assert [(p.chosen, p.rejected) for p in read({"prompt": "q", "trajectories": solved}).pairs] == [(0, 1), (0, 2)]
    replies = [
        {
            "role": "assistant",
            "text": "second",
            "rank": 1,
            "replies": [{"role": "prompter", "text": "why", "replies": [{"role": "assistant", "text": "so"}]}],
        },
        {"role": "assistant", "text": "first", "rank": 0, "replies": []},
        {"role": "assistant", "text": "gone", "rank": 2, "deleted": True},
    ]
    sample = read({"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q", "replies": replies}})
    assert [(p.chosen, p.rejected, p.absolute) for p in sample.pairs] == [(1, 0, False)]
    assert [len(s.prompt or "") for s in sample.sequences] == [1, 1, 3]


def test_questions_say_how_they_are_verified() -> None:
    gsm = read({"question": "q", "answer": "6*12=72\n#### 1,072"})
    assert gsm.verify == {"kind": "number", "answer": "1072"}
    assert gsm.sequences == [Sequence([user("q")], [said("6*12=72\n#### 1,072")])]
    assert read({"question": "q", "final_answer": "51.0"}).sequences[0].completion == [said("51.0")]
    for options, given in (({"A": "x", "B": "y"}, "B"), (["x", "y"], 1)):
        sample = read({"question": "q", "options": options, "answer_idx": given, "answer": "y"})
        assert sample.verify == {"kind": "choice", "answer": "B"}
        assert sample.sequences == [Sequence([user("q\n\nA. x\nB. y")], [said("B. y")])]


def test_token_rows_in_every_form() -> None:
    def form(row: dict[str, Any]) -> list[tuple[list[int] | None, list[bool] | None]]:
        return [(s.input_ids, s.target_mask) for s in read(row).sequences]

    wanted = [([5, 6, 7], [False, False, True])]
    assert form({"input_ids": [5, 6, 7], "prompt_length": 2}) == wanted
    assert form({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}) == wanted
    assert form({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}) == wanted
    assert form({"prompt_ids": [5, 6], "completion_ids": [7]}) == wanted
    assert form({"input_ids": [5, 6]}) == [([5, 6], [False, True])]
    pair = [([5, 6], [False, True]), ([5, 7], [False, True])]
    assert form({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}) == pair
    assert form({"chosen_input_ids": [5, 6], "rejected_input_ids": [5, 7], "prompt_length": 1}) == pair
    assert read({"input_ids": [5, 6], "label": True}).sequences[0].label is True


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"a": 1}, "columns a are no known format"),
        ({"messages": "hello"}, "key 'messages': must be a list of turns"),
        ({"messages": [{"role": "user"}]}, "key 'messages[0].content': must be a string"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "key 'messages[0].role'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text can be trained on"),
        ({"messages": None}, "key 'messages' is missing"),
        ({"prompt": "p", "completion": 3}, "key 'completion': must be a string"),
        ({"prompt": "p", "completion": "c", "label": "maybe"}, "key 'label': must be true or false"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "key 'rejected' is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": [said("b")]}, "key 'rejected': must have the form"),
        ({"instruction": "q", "completions": []}, "key 'completions'"),
        (
            {"instruction": "q", "completions": [{"response": "a", "scores": {"x": "good"}}]},
            "key 'completions[0].scores.x': must be a number",
        ),
        ({"question": "q", "options": {"A": "x"}, "answer_idx": "E"}, "key 'answer_idx': must be one of A"),
        ({"input_ids": [1, 2], "prompt_length": 3}, "key 'prompt_length'"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "key 'labels[1]'"),
        ({"input_ids": [1, 2.5]}, "key 'input_ids'"),
        ({"text": "x", "tools": "{"}, "key 'tools'"),
        ({"prompt": "q", "trajectories": [{"turns": []}]}, "key 'success' is missing"),
    ],
)
def test_a_wrong_field_is_named_with_its_place(row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as error:
        read(row)
    assert str(error.value).startswith("rows.jsonl: line 7: ")
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises((ConfigError, DataError), match="did you mean messages"):
        read({"messages": []}, "message")


def test_formats_of_plugins_are_called_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS._entries, "mine", lambda row: Sample([Sequence(row["ask"], row["tell"])]))
    assert read({"ask": "q", "tell": "a"}, "mine").sequences == [Sequence("q", "a")]
    with pytest.raises(DataError, match=r"line 7: format 'mine' cannot read this row \(KeyError: 'tell'\)"):
        read({"ask": "q"}, "mine")
    monkeypatch.setitem(FORMATS._entries, "empty", lambda row: Sample([]))
    with pytest.raises(DataError, match="at least one sequence"):
        read({"ask": "q"}, "empty")


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data slices are not here")
def test_every_real_file_is_recognised() -> None:
    kinds = {
        "sft": {"messages"},
        "preference": {"preference"},
        "kto": {"unpaired"},
        "scored": {"scored"},
        "trees": {"trees"},
        "math": {"questions"},
        "medical": {"questions", "messages"},
        "eval": {"prompts"},
        "honesty": {"preference", "prompts"},
        "safety": {"preference", "scored"},
    }
    seen: Counter[str] = Counter()
    for file in sorted(SHARED.glob("*/*.jsonl.gz")):
        for row in read_rows(str(file), limit=25):
            name = recognise(set(row.value))
            sample = to_sample(row, name)
            assert name in kinds[file.parent.name], file
            assert sample.id == row.value["id"]
            for pair in sample.pairs:
                assert sample.sequences[pair.chosen].prompt == sample.sequences[pair.rejected].prompt
            for sequence in sample.sequences:
                assert all(turn["role"] == "assistant" for turn in (sequence.completion or [])[:1])
            seen[file.parent.name] += len(sample.pairs)
    assert all(seen[name] for name in ("preference", "trees", "honesty", "safety"))
