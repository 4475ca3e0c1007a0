"""Sweeps: Hydra's grammar and order, one process a point, failures recorded."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.cli import main
from alignlab.errors import ConfigError
from alignlab.launching import sweep
from alignlab.runfolder import RunFolder

BASE = ["objective=dpo", "model=tiny", "data=sums"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_is_swept_and_what_is_not() -> None:
    fixed, axes = sweep.split([
        "objective.beta=0.1,0.5", "seed=range(1,4)", "optim=choice(adamw,rmsprop)", "objective.loss_type=[sigmoid,sft]",
        "data=it's (a) file.jsonl", "model=a b", "data.columns={a: b}", "logger=[jsonl],[jsonl,wandb]",
    ])  # fmt: skip
    assert fixed == [
        "objective.loss_type=[sigmoid,sft]",
        "data=it's (a) file.jsonl",
        "model=a b",
        "data.columns={a: b}",
    ]
    assert axes == [
        ["objective.beta=0.1", "objective.beta=0.5"],
        ["seed=1", "seed=2", "seed=3"],
        ["optim=adamw", "optim=rmsprop"],
        ["logger=[jsonl]", "logger=[jsonl,wandb]"],
    ]
    assert sweep.split(["data='a,b.jsonl','c d.jsonl'"])[1] == [["data=a,b.jsonl", "data=c d.jsonl"]]
    with pytest.raises(ConfigError, match="basic sweeper"):
        sweep.split(["optim.learning_rate=interval(0,1)"])


def test_the_order_is_that_of_hydras_basic_sweeper() -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    tokens = ["seed=0,1", "objective.beta=0.1", "optim=adamw,rmsprop", "data.limit=range(1,3)"]
    theirs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(tokens), None)[0]
    fixed, axes = sweep.split(tokens)
    ours = [[*fixed, *point] for point in itertools.product(*axes)]
    assert [sorted(point) for point in ours] == [sorted(point) for point in theirs]


POINT = """
import json, sys
from pathlib import Path
from alignlab.runfolder import RunFolder
settings = dict(token.partition("=")[::2] for token in sys.argv[1:])
Path("calls.txt").open("a").write(settings["seed"] + "\\n")
folder = RunFolder(Path(settings["output_dir"]) / settings["run.name"])
if folder.finished:
    sys.exit(0)
if settings["seed"] == "1" and not Path("mended").exists():
    sys.exit(3)
folder.path.mkdir(parents=True, exist_ok=True)
folder.metrics.write_text(json.dumps({"step": 1, "loss": 2.0, "attempt": 1}) + "\\n" +
    json.dumps({"step": 2, "loss": float(settings["seed"]), "eval_loss": 0.5}) + "\\n" + '{"st')
folder.write_status(state="done", exit_code=0)
"""


def test_a_failed_point_is_recorded_and_the_sweep_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = sweep.call

    def stand_in(command: list[str], *rest: Any, **options: Any) -> int:
        return call([sys.executable, "-c", POINT, *command[4:]], *rest, **options)

    monkeypatch.setattr(sweep, "call", stand_in)
    words = ["train", "-m", *BASE, "seed=0,1,2", "data.limit=4"]
    assert main([*words, "--json"]) == 1
    (folder,) = Path("sweeps").iterdir()
    assert re.fullmatch(r"dpo-tiny-sums-[0-9a-f]{8}", folder.name)
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(r["point"], r["status"], r["exit_code"], r["overrides"], r["loss"]) for r in rows] == [
        ("000", "done", "0", "seed=0", "0.0"),
        ("001", "failed", "3", "seed=1", ""),
        ("002", "done", "0", "seed=2", "2.0"),
    ]
    assert json.loads(capsys.readouterr().out)["points"][2]["eval_loss"] == 0.5
    described = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert described["points"]["001"] == ["seed=1"]
    Path("mended").touch()
    before = (folder / "000" / "status.json").stat().st_mtime_ns
    assert main(words) == 0
    assert [path.name for path in Path("sweeps").iterdir()] == [folder.name]
    assert (folder / "000" / "status.json").stat().st_mtime_ns == before
    assert RunFolder(folder / "001").finished


def test_errors_of_all_points_are_said_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", *BASE, "seed=0,1", "optim.lr=1"]) == 2
    assert "optim.learning_rate" in capsys.readouterr().err
    assert os.listdir(".") == []
    assert main(["train", "-m", *BASE, "seed=0"]) == 2
    assert main(["probe", "-m", *BASE, "seed=0,1"]) == 2
    assert main(["train", "-m", *BASE, "seed=0,1", "seed=5"]) == 2
    assert main(["train", "-m", *BASE, "run.name=a,b"]) == 2


def test_dry_run_lists_the_points(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", *BASE, "seed=0,1", "launch.dry_run=true"]) == 0
    assert capsys.readouterr().out.splitlines() == ["000  seed=0", "001  seed=1"]
    assert os.listdir(".") == []


def test_the_table_has_every_metric_of_every_point() -> None:
    text = sweep.table([
        {"point": "000", "status": "done", "exit_code": 0, "overrides": 'a=1 b="x, y"', "loss": 1.0},
        {"point": "001", "status": "done", "exit_code": 0, "overrides": "a=2", "acc": 0.5},
    ])  # fmt: skip
    rows = list(csv.DictReader(text.splitlines()))
    assert rows[0]["overrides"] == 'a=1 b="x, y"'
    assert (rows[0]["acc"], rows[1]["loss"], rows[1]["acc"]) == ("", "", "0.5")
