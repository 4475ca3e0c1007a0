"""``alignlab evaluate RUN tasks=...``: what the harness is told, and what becomes of what it says.

The harness is a stand-in here: a package of its name that reads the file of settings and writes a result in its form.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
STAND_IN = """
import json, pathlib, sys

assert sys.argv[1:3] == ["run", "--config"], sys.argv
said = json.loads(pathlib.Path(sys.argv[3]).read_text())
print("harness at work")
if "unknown" in said["tasks"]:
    print("ValueError: Tasks not found: unknown", file=sys.stderr)
    sys.exit(1)
out = pathlib.Path(said["output_path"]) / "model"
out.mkdir(parents=True)
results = {name: {"alias": name, "acc,none": 0.25, "acc_stderr,none": 0.1, "f1,strict": 0.5, "f1_stderr,strict": "N/A"}
           for name in said["tasks"]}
(out / "results_2026-01-01.json").write_text(json.dumps({"results": results, "config": said}))
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``lm_eval`` for this process and those it starts."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def finished(home: Path, small_model: Path) -> Path:
    """A run folder with a model, as a training leaves it."""
    folder = home / "runs" / "finished"
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(f"model: {{name_or_path: {small_model}}}\n")
        shutil.copytree(small_model, folder / "model")
    return folder


@pytest.mark.usefixtures("harness")
def test_the_folder_is_handed_over_and_the_figures_come_back(run: Run, home: Path, finished: Path) -> None:
    (home / "own tasks").mkdir()
    words = ["tasks=arc_easy,own", "tasks.include_path=own tasks", "tasks.num_fewshot=2", "tasks.limit=5",
             "eval.batch_size=3", "seed=7"]  # fmt: skip
    answer = run("evaluate", str(finished), *words)
    assert answer.code == 0, answer.err
    lines = [line.split() for line in answer.out.splitlines()]
    assert ["arc_easy", "acc", "0.2500", "+-", "0.1000"] in lines
    assert ["own", "f1", "(strict)", "0.5000"] in lines
    (file,) = (finished / "eval").glob("lm-eval-*.json")
    kept = json.loads(file.read_text())
    told = kept["config"]
    assert told["model_args"] == {
        "pretrained": str(finished / "model"), "dtype": "float32", "trust_remote_code": False,
    }  # fmt: skip
    assert told["tasks"] == ["arc_easy", "own"]
    assert (told["num_fewshot"], told["limit"], told["batch_size"], told["device"]) == (2, 5, 3, "cpu")
    assert told["seed"] == [7, 7, 7, 7]
    assert told["include_path"] == str(home / "own tasks")
    assert told["apply_chat_template"] is True
    assert "harness at work" in (finished / "eval" / "lm-eval.txt").read_text()
    again = run("evaluate", str(finished), *words, "tasks.chat_template=false", "--json").json
    assert again["config"]["apply_chat_template"] is False
    assert len(list((finished / "eval").glob("lm-eval-*.json"))) == 2


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks=unknown"], "lm-eval ended with 1: ValueError: Tasks not found: unknown (all it said: "),
        (["tasks="], "name at least one"),
        (["tasks=arc_easy", "tasks.include_path=nowhere"], "no such folder: nowhere"),
        (["tasks=arc_easy", "tasks.limit=0"], "tasks.limit: 0 (expected 1 or more)"),
        (["tasks=arc_easy", "tasks.num_fewshot=few"], "tasks.num_fewshot: few (expected a whole number"),
        (["tasks.limit=3"], "tasks.limit= goes with tasks=NAMES"),
        (["tasks=arc_easy", "model=tiny"], "names the model already; leave out model=tiny"),
    ],
)
def test_wrong_input_is_one_line(run: Run, finished: Path, words: list[str], said: str) -> None:
    answer = run("evaluate", str(finished), *words)
    assert answer.code == 2, answer
    assert said in answer.err
    assert answer.err.count("\n") == 1


def test_without_the_harness_the_extra_is_named(run: Run, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignlab.verbs.evaluate_tasks.MODULE", "lm_eval_that_is_not_here")
    answer = run("evaluate", str(finished), "tasks=arc_easy")
    assert answer.code == 2
    assert "pip install 'alignlab[lm-eval]'" in answer.err
