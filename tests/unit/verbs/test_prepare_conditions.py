"""``prepare`` says what conditions do to the data before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_preview_of_conditions(run: Callable[..., Any], small_model: Path) -> None:
    words = [f"model={small_model}", "data=sums", "data.options={rows: 8, eval_rows: 2}"]
    bucket = "data.condition.buckets=[{condition: {steps: 1}, max_count: 1000}]"
    conditioned = run("prepare", "objective=cpo", *words, bucket)
    assert conditioned.code == 0, conditioned.err
    lines = conditioned.out.splitlines()
    head = next(number for number, line in enumerate(lines) if "best changes" in line)
    assert lines[head + 1].split()[-2:] == ["<Steps:", "1>"]
    assert "all 1 conditions" in lines[head + 2]
    assert "best changes" not in run("prepare", "objective=dpo", *words).out
