"""The commands of docs/diff.md and docs/shadow.md, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[3] / "docs"
Run = Callable[..., Any]


def commands(page: str) -> list[list[str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [shlex.split(line)[1:] for line in re.findall(r"^    (alignlab .*)$", text, re.M)]


def test_diff(run: Run, home: Path) -> None:
    codes = [run(*words).code for words in commands("diff.md")]
    assert codes == [0, 0, 0, 0, 1]
    found = json.loads((home / "difference.json").read_text())
    assert found["numbers"]["data.options.seed"]["values"] == [None, 1]
    assert found["samples"]["step"] == 1


def test_shadow(run: Run, home: Path) -> None:
    answers = [run(*words) for words in commands("shadow.md")]
    assert [answer.code for answer in answers] == [0, 0]
    after = json.loads((home / "runs" / "ift" / "result.json").read_text())["after"]
    said = dict(re.findall(r"^(eval_\S+) +(\S+)$", answers[1].out, re.M))
    assert after["shadow/dpo"] == pytest.approx(float(said["eval_loss"]), rel=1e-4)
    assert after["shadow/dpo_margin"] == pytest.approx(float(said["eval_rewards/margins"]), abs=1e-4)
