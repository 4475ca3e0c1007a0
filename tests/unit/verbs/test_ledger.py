"""``alignlab ledger`` on runs made by the command line: its answers, its comparisons, and runs that died on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

import alignlab
from alignlab.data.ledger import StepLedger
from alignlab.engine import checkpoint
from alignlab.errors import StorageError

Run = Callable[..., Any]


@pytest.fixture
def trained(run: Run, home: Path, settings: list[str]) -> str:
    """A finished run of 4 steps of 4 pairs, trained once for the module."""
    if not (home / "runs" / "whole").exists():
        assert run("train", *settings, "train.save_steps=2", "run.name=whole").code == 0
    return "runs/whole"


def manifest(folder: str) -> dict[str, Any]:
    found = json.loads(Path(folder, "data", "manifest.json").read_text())["train"]
    assert isinstance(found, dict)
    return found


def test_the_account_of_a_run(run: Run, trained: str) -> None:
    account = manifest(trained)
    found = run("ledger", trained, "--json").json
    assert (found["steps"], found["last_step"], found["missing_steps"], found["skipped_steps"]) == (4, 4, [], [])
    assert found["rows"] == {"read": 24, "kept": 24, "dropped": {}}
    assert found["samples"] == {"stored": 24, "distinct": 24, "seen": 16}
    assert found["times_seen"] == {"min": 0, "median": 1, "max": 1}
    assert (found["tokens"], found["supervised"]) == (account["tokens"], account["target_tokens"])
    assert sum(found["roles"].values()) == found["tokens"]
    assert found["roles"]["assistant"] == found["supervised"]
    records = [json.loads(line) for line in Path(trained, "metrics.jsonl").read_text().splitlines()]
    assert found["tokens_in_steps"] == max(record.get("num_tokens", 0) for record in records)
    answer = run("ledger", trained)
    assert (answer.code, answer.err) == (0, "")
    assert f"stream   {found['stream']}" in answer.out
    assert "24; 16 seen at least once; times seen: min 0, median 1, max 1" in answer.out
    segments = sorted(path.name for path in Path(trained, "ledger").glob("steps-*"))
    assert segments == ["steps-000000001-000000002.parquet", "steps-000000003-000000004.parquet"]


def test_the_samples_of_a_step_and_the_steps_of_a_sample(run: Run, trained: str) -> None:
    found = run("ledger", trained, "step=3", "--json").json
    assert found["step"] == 3
    assert found["examples"] == found["unit_pair"] == len(found["samples"]) == 4
    assert found["supervised"] == sum(one["supervised"] for one in found["samples"])
    text = run("ledger", trained, "step=3").out
    for one in found["samples"]:
        (line,) = [line for line in text.splitlines() if f" {one['id']} " in line]
        assert f":{one['line']} " in line
        (sample,) = run("ledger", trained, f"sample={one['id']}", "--json").json["found"]
        assert (sample["steps"], sample["times_seen"], sample["status"]) == ([3], 1.0, "kept")
        assert (sample["hash"], sample["supervised"]) == (one["hash"], one["supervised"])
        assert "seen     1 times in 1 steps: 3" in run("ledger", trained, f"sample={one['id']}").out


def test_a_dropped_row_says_why(run: Run, home: Path, settings: list[str]) -> None:
    rows = [{"id": f"p{n}", "prompt": "q", "chosen": "good", "rejected": "good" if n == 2 else "bad"} for n in range(5)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word for word in settings if not word.startswith(("data", "train.max_steps"))]
    assert run("train", *words, "data=pairs.jsonl", "train.max_steps=1", "run.name=dropped").code == 0
    answer = run("ledger", "runs/dropped", "sample=pairs.jsonl:3")
    assert answer.out == "sample   p2   pairs.jsonl:3   dropped: identical_pair\n"
    assert "5 read = 4 kept + 1 dropped (identical_pair 1)" in run("ledger", "runs/dropped").out


def test_two_runs_are_compared_by_what_they_saw(run: Run, home: Path, settings: list[str], trained: str) -> None:
    """A speed setting leaves the stream, a seed does not, and a shorter run is not the same."""
    quick = [*settings, "optim.learning_rate=1e-4"]
    assert run("train", *quick, "train.token_budget=128", "model.layout=rows", "run.name=layout").code == 0
    assert run("train", *quick, "seed=1", "run.name=seed").code == 0
    assert run("train", *quick, "train.max_steps=3", "run.name=short").code == 0
    same = run("ledger", trained, "other=runs/layout", "--json")
    assert (same.code, same.json["same"]) == (0, True)
    assert same.json["streams"][0] == same.json["streams"][1]
    assert run("ledger", trained, "other=runs/layout").out.startswith("same     4 steps   stream ")
    other = run("ledger", trained, "other=runs/seed", "--json")
    assert (other.code, other.json["same"], other.json["first_difference"]) == (1, False, 1)
    assert all(other.json["only"])
    answer = run("ledger", trained, "other=runs/seed")
    assert answer.code == 1
    assert answer.out.startswith("differ   first at step 1; the 0 before it are the same\nonly in  runs/whole: ")
    short = run("ledger", trained, "other=runs/short")
    assert short.code == 1
    assert "runs/whole has 4 steps (1 to 4) and runs/short 3 steps (1 to 3)" in short.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "ledger: which run?"),
        (["runs/none"], "ledger: no such run: runs/none"),
        (["runs/whole", "steps=3"], "ledger: cannot answer 'steps=3'; ask ledger RUN"),
        (["runs/whole", "step=2", "sample=x"], "ledger: cannot answer 'step=2 sample=x'"),
        (["runs/whole", "step="], "ledger: cannot answer 'step='"),
        (["runs/whole", "step=two"], "ledger: step=two is not a step's number"),
        (["runs/whole", "step=5"], "step 5 is not in the ledger, which holds 1 to 4"),
        (["runs/whole", "step=0"], "step 0 is not in the ledger, which holds 1 to 4"),
        (["runs/whole", "sample=nobody"], "no sample 'nobody' in the ledger"),
        (["runs/whole", "other=runs/none"], "ledger: no such run: runs/none"),
    ],
)
def test_wrong_questions(run: Run, trained: str, words: list[str], said: str) -> None:
    answer = run("ledger", *words)
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) == 1
    assert said in answer.err


def test_a_run_without_a_ledger_and_a_damaged_one(run: Run, trained: str) -> None:
    shutil.copytree(trained, "runs/hurt")
    segment = Path("runs/hurt/ledger/steps-000000001-000000002.parquet")
    segment.write_bytes(segment.read_bytes()[:-20])
    answer = run("ledger", "runs/hurt")
    assert answer.code == 4
    assert f"{segment}: damaged" in answer.err
    shutil.rmtree("runs/hurt/ledger")
    answer = run("ledger", "runs/hurt")
    assert answer.code == 2
    assert "runs/hurt has no ledger" in answer.err


def test_from_python_and_in_the_help(run: Run, trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert alignlab.run("ledger", trained, step=2) == 0
    assert capsys.readouterr().out.startswith("step     2 ")
    assert "ledger RUN [step=N | sample=ID | other=RUN]" in run("--help-all").out
    assert "ledger" not in run("--help").out


# ---------------------------------------------------------------------------------------------------------------
# Death on the way
# ---------------------------------------------------------------------------------------------------------------


class Died(StorageError):
    """Stands for SIGKILL: nothing is written behind it."""


def dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing reaches the ledger's folder."""
    monkeypatch.setattr(StepLedger, "flush", lambda self: None)


@pytest.mark.parametrize("moment", ["before", "behind"])
def test_a_kill_at_a_checkpoint_leaves_no_gap_and_no_step_twice(
    run: Run, settings: list[str], trained: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Between the ledger's segment and the checkpoint, and just behind the checkpoint."""
    words = [*settings, "train.save_steps=1", f"run.name=killed-{moment}"]
    publish = checkpoint.publish

    def killed(root: Path, step: int, write: Any, *rest: Any) -> Any:
        def write_and_die(staging: Path) -> None:
            write(staging)
            if step == 2 and moment == "before":
                dies(patch)
                raise Died("killed")

        made = publish(root, step, write_and_die, *rest)
        if step == 2:
            dies(patch)
            raise Died("killed")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", killed)
        assert run("train", *words).code == 4
    folder = f"runs/killed-{moment}"
    newest = {"before": 1, "behind": 2}[moment]
    assert checkpoint.paths(Path(folder, "checkpoints"))[0].name == f"checkpoint-{newest}"
    assert run("ledger", folder, "--json").json["steps"] == 2
    again = run("train", *words)
    assert again.code == 0
    assert f"resumed at {newest}" in again.out
    found = run("ledger", folder, "--json").json
    assert (found["steps"], found["missing_steps"]) == (4, [])
    on_disk = [parquet.read_metadata(path).num_rows for path in Path(folder, "ledger").glob("steps-*")]
    assert sum(on_disk) == 4
    assert run("ledger", folder, f"other={trained}").code == 0
