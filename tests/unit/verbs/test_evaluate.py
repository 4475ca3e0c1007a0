"""Where a measurement is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignlab.configuration.compose import compose
from alignlab.verbs.evaluate import result_name


def test_no_two_measurements_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "held.jsonl").write_text(f"{number}\n")

    def name(*words: str) -> str:
        return result_name(compose(["model=tiny", *words]).config)

    rows = "data.eval_path=a/held.jsonl"
    names = [
        name("objective=dpo", rows),
        name("objective=sft", rows),
        name("objective=dpo", "objective.loss_type=ipo", rows),
        name("objective=dpo", "data.eval_path=b/held.jsonl"),
        name("objective=dpo", rows, "eval.generate=8"),
    ]
    assert len(set(names)) == len(names)
    assert names[0].startswith("held-dpo-")
    assert names[0] == name("objective=dpo", rows, "optim.learning_rate=1", "engine=local")
