"""The sides that a judge compares: whose answers they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from alignlab.config import DataConfig
from alignlab.data.sources import Needs
from alignlab.judges.sides import from_file, from_rows
from alignlab.measuring.verification import prompts_of
from alignlab.types import Unit


def test_a_share_held_out_is_the_one_that_is_judged(tmp_path: Path) -> None:
    """Rows parted by ``data.eval_fraction``: the judge sees the rows that training leaves out, and those alone; of a
    file of answers it sees all."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(60)))
    data = DataConfig(path=str(file), eval_fraction=0.3)
    held_out = {str(prompt.messages) for prompt in prompts_of(data, Needs(Unit.SEQUENCE), held_out=True)}
    assert 8 <= len(held_out) <= 28  # 18 expected; 10 are nearly 3 standard deviations of 60 * 0.3 * 0.7
    assert {str(prompt.messages) for prompt in from_rows(data).prompts} == held_out
    assert len(from_file(str(file), data).prompts) == 60
    assert len(from_rows(replace(data, eval_fraction=0.0)).prompts) == 60
