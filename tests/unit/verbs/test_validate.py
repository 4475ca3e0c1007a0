"""``alignlab validate``: every problem in one go, notes on what is not here, two small steps on request."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

GOOD = ["objective=dpo", "model=tiny", "data=sums", "data.options={rows: 24, eval_rows: 4}"]


def test_nothing_to_say(run: Any, home: Path) -> None:
    answer = run("validate", *GOOD)
    assert answer.code == 0
    assert answer.out.startswith("ok       dpo-tiny-sums-")
    assert not (home / "runs").exists()
    found = run("validate", *GOOD, "--json").json
    assert found == {"ok": True, "run": found["run"], "notes": [], "dry_run": None}


def test_a_file_is_read_as_train_would_read_it(run: Any, home: Path) -> None:
    (home / "mine.yaml").write_text("objective: dpo\nmodel: tiny\ndata: sums\noptim.alpha: 0.5\n")
    answer = run("validate", "mine.yaml")
    assert answer.code == 2
    said = "optim.alpha: set in mine.yaml, but nothing reads it with optim=adamw; drop it or take optim=rmsprop"
    assert answer.err == f"alignlab: {said}\n"
    assert run("validate", "mine.yaml", "optim=rmsprop").code == 0


def test_everything_wrong_is_said_together(run: Any, home: Path) -> None:
    (home / "rows.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "So."}) + "\n")
    answer = run(
        "validate", "objective=dpo", "model=tiny", "data=rows.jsonl", "data.eval_path=sums",
        "data.options={rows: 24, kind: demonstrations}", "engine=zero2", "optim=adamw_8bit", "optim.alpha=0.9",
    )  # fmt: skip
    lines = answer.err.splitlines()
    assert answer.code == 2
    assert answer.out == ""
    expected = [
        "optim.alpha: set on the command line, but nothing reads it with optim=adamw_8bit",
        "optim=adamw_8bit works with engine=local and zero0, not zero2",
        "rows.jsonl: line 1: row rows.jsonl:1: the objective needs pairs",
        "sums: line 1: row sums-test-0-demonstrations-0: the objective needs pairs",
    ]
    for text in expected:
        assert sum(text in line for line in lines) == 1, (text, lines)
    assert len([line for line in lines if "needs bitsandbytes" not in line]) == len(expected)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.max_step=3"], "unknown key 'train.max_step'"),
        (["peft=qlora", "engine=zero3"], "peft=qlora works with engine=local and zero0 .. zero2"),
        (["peft=qlora", "model.dtype=fp64"], "peft=qlora works with model.dtype=fp32 and bf16"),
        (["engine=zero0", "model.dtype=bf16"], "use engine=zero1"),
        (["launch=sbatch", "launch.gpus_per_node=8", "optim=adamw_8bit"], "not zero2: ZeRO cuts its blocks apart"),
        (["plugins=[nowhere.py]"], "nowhere.py"),
        (["objective.beta=-1"], "objective.beta"),
        (["dry_run=perhaps"], "dry_run: perhaps (expected true or false)"),
    ],
)
def test_a_line_for(run: Any, settings: list[str], says: str) -> None:
    answer = run("validate", *GOOD, *settings)
    assert answer.code == 2
    assert says in answer.err


def test_the_first_rows_only_are_read(run: Any, home: Path) -> None:
    """A fault in the hundredth row is for `prepare`; one in the first rows is seen."""
    good = json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."})
    (home / "late.jsonl").write_text((good + "\n") * 99 + "{}\n")
    (home / "early.jsonl").write_text((good + "\n") * 9 + "{}\n")
    assert run("validate", "objective=dpo", "model=tiny", "data=late.jsonl").code == 0
    answer = run("validate", "objective=dpo", "model=tiny", "data=early.jsonl")
    assert answer.code == 2
    assert "early.jsonl: line 10" in answer.err


PLUGIN = """
from dataclasses import dataclass
from alignlab.objectives.base import BaseObjective, sequence_sums
from alignlab.registry import register_objective
from alignlab.types import Ask, LossOutput, Unit

@dataclass
class NeedyConfig:
    strength: float = 1.0

@register_objective
class Needy(BaseObjective):
    name, Config = "needy", NeedyConfig

    def __call__(self, score, batch, context):
        logps = score(batch, Ask("logps")).logps[batch.seq_idx]
        loss = -self.config.strength * sequence_sums(logps, batch) * batch.sequence_values["score/quality"]
        return LossOutput({Unit.SEQUENCE: loss.sum()}, {})
"""


def test_an_objective_from_outside_meets_the_rows(run: Any, home: Path) -> None:
    """Random rows have a quality; the user's have one only where a row says so."""
    (home / "needy.py").write_text(PLUGIN)
    row: dict[str, Any] = {"prompt": "Why?", "completion": "So."}
    (home / "plain.jsonl").write_text(json.dumps(row) + "\n")
    (home / "rated.jsonl").write_text(json.dumps(row | {"scores": {"quality": 2}}) + "\n")
    words = ["validate", "plugins=[needy.py]", "objective=needy", "model=tiny"]
    assert run(*words, "data=rated.jsonl").code == 0
    answer = run(*words, "data=plain.jsonl")
    assert answer.code == 2
    assert "objective=needy fails on these rows: KeyError: 'score/quality'" in answer.err


def test_what_is_not_here_is_named(run: Any) -> None:
    answer = run("validate", "objective=dpo", "model=someone/large-7b", "data=ultrafeedback_binarized")
    assert answer.code == 0
    assert answer.out.splitlines()[1:] == [
        "model    someone/large-7b is not on this machine: not looked at",
        "data     HuggingFaceH4/ultrafeedback_binarized (split train_prefs) is not on this machine: not looked at",
    ]


PAGE = Path(__file__).parents[3] / "docs" / "validate.md"
EXAMPLES = [line.split()[1:] for line in PAGE.read_text().splitlines() if line.startswith("    alignlab ")]


@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_the_page_s_examples(run: Any, words: list[str]) -> None:
    answer = run(*shlex.split(" ".join(words)))
    assert answer.code == 0, answer.err
    assert "ok       " in answer.out
    assert ("dry run  tiny; loss" in answer.out) == ("dry_run=true" in words)


def test_a_dry_run(run: Any, home: Path) -> None:
    answer = run("validate", *GOOD, "peft=lora", "optim=rmsprop", "dry_run=true", "--json")
    found = answer.json["dry_run"]
    assert found["steps"] == 2
    assert found["losses"] == pytest.approx([0.6931472] * 2, abs=1e-3)  # -log s(0), and a step of learning rate 0
    assert found["model"] == "tiny"
    assert not (home / "runs").exists()
    bad = run("validate", *GOOD, "peft=lora", "peft.lora_target_modules=w_query", "dry_run=true")
    assert bad.code == 2
    assert "dry run: peft.lora_target_modules" in bad.err
