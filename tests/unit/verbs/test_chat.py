"""A conversation by lines from a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.measuring.sampling import Sampler
from alignlab.measuring.verification import Answer, Prompt


class Echo:
    """In the sampler's place: answers with the number of turns that it sees and the last thing said."""

    asked: list[list[dict[str, str]]]

    def __init__(self, config: Any, verb: str) -> None:
        Echo.asked = []

    def answers(self, prompts: list[Prompt], **changes: Any) -> list[Answer]:
        turns = prompts[0].messages
        assert not isinstance(turns, str)
        Echo.asked.append(turns)  # type: ignore[arg-type]
        return [Answer(prompts[0], [f"{len(turns)}: {turns[-1]['content']}"], [{}])]


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_turns_are_kept_undone_and_forgotten(
    home: Path, run: Callable[..., Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignlab.verbs.chat.Sampler", Echo)
    say(monkeypatch, "a", "", "b", "/undo", "c", "/what", "/new", "d", "/quit", "e")
    answer = run("chat", str(small_model), "system=S")
    assert answer.code == 0
    # The system turn and "a": 2 turns; then with the answer and "b": 4; "b" undone, "c": 4 again; anew, "d": 2.
    said = ["2: a", "4: b", "4: c", "unknown: /what (known: /new, /undo, /quit)", "2: d"]
    assert answer.out.splitlines() == said
    assert [turn["content"] for turn in Echo.asked[2]] == ["S", "a", "2: a", "c"]


def test_json_has_the_turns_and_nothing_else(
    home: Path, run: Callable[..., Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignlab.verbs.chat.Sampler", Echo)
    say(monkeypatch, "a")
    assert [turn["content"] for turn in run("chat", str(small_model), "--json").json["messages"]] == ["a", "1: a"]


def test_a_real_model_answers(
    home: Path, run: Callable[..., Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    whole = Sampler.answers
    monkeypatch.setattr(
        Sampler, "answers", lambda self, prompts, **kw: seen.append(kw["seed"]) or whole(self, prompts, **kw)
    )
    say(monkeypatch, "Hello", "Hello")
    answer = run("chat", str(small_model), "eval.max_new_tokens=4", "eval.temperature=1", "--json")
    turns = answer.json["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert len(set(seen)) == 2, "every answer has a draw of its own"


def test_a_condition_needs_a_conditioned_run(home: Path, run: Callable[..., Any], small_model: Path) -> None:
    answer = run("chat", str(small_model), "condition={steps: 1}")
    assert answer.code == 2
    assert "condition= is for a run of objective=cpsft or objective=cpo" in answer.err
