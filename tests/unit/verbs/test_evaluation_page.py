"""What docs/evaluation.md tells to try, and what its tables say of keys."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from alignlab import verb_table
from alignlab.judges.templates import TEMPLATES
from alignlab.registry import VERIFIERS
from alignlab.verbs.evaluate_judge import JudgeConfig
from alignlab.verbs.evaluate_tasks import TasksConfig

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page(run: Callable[..., Any], home: Path) -> None:
    block = PAGE.split("Try it")[1].split("\n\n")[1]
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[1] for words in commands] == ["train", "sample", "sample", "evaluate", "evaluate"]
    for words in commands:
        redirected = words[words.index(">") + 1] if ">" in words else None
        answer = run(*(words[1 : words.index(">")] if redirected else words[1:]))
        assert answer.code == 0, answer.err
        if redirected:
            (home / redirected).write_text(answer.out)
            rows = list(map(json.loads, answer.out.splitlines()))
            assert [len(row["texts"]) for row in rows] == [1] * 6
    assert "answers  6 prompts, answers.jsonl against rows" in answer.out


def test_the_page_names_what_there_is() -> None:
    assert {field.name for field in fields(JudgeConfig)} == set(verb_table.JUDGE)
    assert {field.name for field in fields(TasksConfig)} == set(verb_table.TASKS)
    told = set(re.findall(r"`judge\.(\w+)`", PAGE))
    assert told == {field.name for field in fields(JudgeConfig)}
    assert set(re.findall(r"`tasks\.(\w+)[`=]", PAGE)) == {field.name for field in fields(TasksConfig)}
    for name in (*TEMPLATES, *VERIFIERS.names()):
        if VERIFIERS.is_builtin(name) or name in TEMPLATES:
            assert f"`{name}`" in PAGE
