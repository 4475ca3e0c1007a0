"""An objective, a row format and a verifier from one file outside the checkout, trained from outside the checkout."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import forks
import pytest

from alignlab import testing
from alignlab.configuration.plugins import load
from alignlab.registry import OBJECTIVES

MINE = '''
from dataclasses import dataclass

from alignlab.objectives.base import BaseObjective
from alignlab.registry import register_format, register_objective, register_verifier
from alignlab.types import Ask, LossOutput, Sample, Sequence, Unit


@dataclass
class SquaredConfig:
    surprise: float = 1.5
    """negative log-probability that every target is pulled to"""


@register_objective
class Squared(BaseObjective):
    name = "squared"
    units = (Unit.TOKEN,)
    Config = SquaredConfig

    def __call__(self, score, batch, context):
        logps = score(batch, Ask("logps")).logps[batch.seq_idx]
        weights = batch.sequence_values["weight"].to(logps.dtype)[batch.seq_of]
        return LossOutput({Unit.TOKEN: (weights * (logps + self.config.surprise) ** 2).sum()}, {})


@register_format("question_reply")
def question_reply(row):
    turns = [{"role": role, "content": row[key]} for role, key in (("user", "q"), ("assistant", "r"))]
    return Sample([Sequence(turns[:1], turns[1:])], verify={"kind": "counted", "length": len(row["r"])})


@register_verifier("counted")
def counted(verify, completion):
    return {"wanted": float(verify["length"]), "wrote": float(len(completion))}
'''

NOT_AN_OBJECTIVE = MINE.replace("** 2).sum()", "** 2).mean()").replace('"squared"', '"averaged"')
NOT_AN_OBJECTIVE = NOT_AN_OBJECTIVE.replace('"question_reply"', '"averaged_rows"').replace('"counted"', '"averaged_v"')


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the plug-in and its rows: three replies of 1, 2 and 3 letters."""
    (tmp_path / "mine.py").write_text(MINE)
    rows = [json.dumps({"q": f"How many {n}?", "r": "a" * n}) for n in (1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def alignlab(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    started = forks.start(*words, cwd=folder, env={"ALIGNLAB_CACHE": str(folder / "cache")})
    out, err = started.communicate(timeout=200)
    return subprocess.CompletedProcess(words, started.wait(), out, err)


def test_one_file_is_enough(place: Path) -> None:
    words = [
        "objective=squared", "objective.surprise=0.5", "plugins=[./mine.py]", "model=tiny", "data=rows.jsonl",
        "data.format=question_reply", "data.eval_path=rows.jsonl", "eval.generate=3", "eval.max_new_tokens=3",
        "train.max_steps=2", "train.global_batch_size=3", "optim.learning_rate=1e-2", "run.name=mine",
        "data.leaks=keep",
    ]  # fmt: skip
    answer = alignlab(place, "train", *words, "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["state"] == "done"
    run = place / "runs" / "mine"
    assert (run / "plugins" / "mine.py").read_text() == MINE
    assert json.loads((run / "plugins" / "plugins.json").read_text()) == {
        "mine.py": hashlib.sha256(MINE.encode()).hexdigest()
    }
    assert "surprise: 0.5" in (run / "run.yaml").read_text()
    first, after = (json.loads((run / "eval" / f"step-{step}.json").read_text()) for step in (0, 2))
    assert first["eval_wanted"] == 2.0  # (1 + 2 + 3) / 3, through the rows' ``verify``
    assert 0 <= first["eval_wrote"] <= 3 * 8  # at most three tokens
    # Untrained, every one of the 395 tokens has about the same probability: (log 395 - 0.5)^2 = 30.
    assert 25 < first["eval_loss"] < 40
    assert after["eval_loss"] < 0.8 * first["eval_loss"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in metrics if "loss" in line) == pytest.approx(first["eval_loss"], rel=1e-5)

    (place / "mine.py").unlink()  # the run folder has all it needs
    again = alignlab(place, "evaluate", "runs/mine", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["metrics"]["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-5)


def test_its_mistakes_are_one_line(place: Path) -> None:
    words = ["objective=squared", "plugins=[./mine.py]", "model=tiny", "data=rows.jsonl"]
    unknown = alignlab(place, "train", *words, "objective.suprise=1")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert "objective.surprise" in unknown.stderr
    (place / "rows.jsonl").write_text('{"q": "Hi"}\n')
    row = alignlab(place, "train", *words, "data.format=question_reply", "run.name=x")
    assert (row.returncode, row.stderr.count("\n")) == (2, 1), row.stderr
    for hint in ("rows.jsonl", "1", "'r'"):
        assert hint in row.stderr


def test_check_objective_of_a_plug_in(tmp_path: Path) -> None:
    """It passes for the sum, and names what is wrong with a mean, which would depend on the micro-batches."""
    for name, text in {"good": MINE, "bad": NOT_AN_OBJECTIVE}.items():
        (tmp_path / f"{name}.py").write_text(text)
        load([str(tmp_path / f"{name}.py")])
    testing.check_objective(OBJECTIVES.get("squared"))
    with pytest.raises(testing.CheckFailed, match="sums"):
        testing.check_objective(OBJECTIVES.get("averaged"))
