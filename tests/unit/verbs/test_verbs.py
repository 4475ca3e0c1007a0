"""Every verb through the command line: what it prints, what its JSON holds, and that the figures agree."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest

from alignlab.configuration.compose import compose
from alignlab.errors import ConfigError, StorageError
from alignlab.runs import job as job_module
from alignlab.runs.job import assemble, attach_reference, prepare_data
from alignlab.train.margins import read_margins
from alignlab.verbs.env import collect, gpus

Run = Callable[..., Any]
LN2 = math.log(2)


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that belong to steps."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture
def trained(run: Run, home: Path, settings: list[str]) -> Path:
    """A finished run, trained once for the module."""
    folder = home / "runs" / "whole"
    if not folder.exists():
        assert run("train", *settings, "run.name=whole").code == 0
    return folder


# ---------------------------------------------------------------------------------------------------------------
# Before training
# ---------------------------------------------------------------------------------------------------------------


def test_prepare_leaves_nothing_to_compute(run: Run, settings: list[str]) -> None:
    rows = [*settings, "data.options={rows: 12, eval_rows: 4}"]
    made = run("prepare", *rows, "reference=true", "--json").json
    assert made["fresh"] is True
    assert made["data"]["train"]["read"] == made["data"]["train"]["kept"] == made["data"]["train"]["pairs"] == 12
    assert made["data"]["held_out"]["pairs"] == 4
    assert made["reference"]["seconds"] > 0
    again = run("prepare", *rows, "reference=true", "--json").json
    assert again["fresh"] is False
    assert again["reference"]["seconds"] == 0
    assert again["index"] == made["index"]
    answer = run("train", *rows, "run.name=prepared")
    assert answer.code == 0
    assert "reference: initial policy, cached (0 s)" in answer.out


def test_without_prepare_train_computes_the_reference(run: Run, settings: list[str]) -> None:
    answer = run("train", *settings, "data.options={rows: 14, eval_rows: 4}", "run.name=unprepared")
    assert "reference: initial policy, computed" in answer.out


def test_prepare_of_an_objective_without_a_reference(run: Run, settings: list[str]) -> None:
    answer = run("prepare", *settings, "objective=sft", "reference=true", "--json")
    assert answer.code == 0
    assert answer.json["reference"] is None


def test_several_ranks_read_the_numbers_of_a_named_reference(
    run: Run, home: Path, settings: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cannot compute them (that model is in no engine of theirs): an error before, the prepared numbers after."""
    named = [*settings, f"reference={trained / 'model'}"]
    config = compose(named).config
    job = assemble(config, prepare_data(config))
    with monkeypatch.context() as several:
        several.setattr(job_module.dist, "world_size", lambda: 2)
        with pytest.raises(ConfigError, match="alignlab prepare"):
            attach_reference(job)
    made = run("prepare", *named, "reference.compute=true", "--json").json
    assert made["reference"]["name"] == str(trained / "model")
    with monkeypatch.context() as several:
        several.setattr(job_module.dist, "world_size", lambda: 2)
        assert attach_reference(job) == 0.0
    theirs = job.loader.values["reference"]
    own = assemble(compose(settings).config, job.data)
    attach_reference(own)
    assert abs(theirs - own.loader.values["reference"]).max() > 0.1  # the trained model's, not the policy's


def test_inspect_shows_rows_and_their_account(run: Run, settings: list[str]) -> None:
    found = run("inspect", *settings, "--json").json
    first = found["rows"][0]
    assert first["pairs"] == [[0, 1]]
    for sequence in first["sequences"]:
        assert len(sequence["input_ids"]) == len(sequence["target_mask"])
        assert "<|im_start|>assistant\n[[" in sequence["text"]  # the target begins after the generation prompt
        assert sequence["text"].endswith("<|im_end|>\n]]")  # and ends with the terminator
    lengths = [len(sequence["input_ids"]) for sequence in first["sequences"]]
    begin = first["tree"].split(":")[1].split()[0]
    assert 0 < int(begin) < min(lengths)  # the prompt is shared
    assert found["tree_tokens"] < found["manifest"]["tokens"]
    text = run("inspect", *settings).out
    assert "24 read = 24 kept + 0 dropped" in text


def test_probe_is_the_first_step_without_the_update(run: Run, home: Path, settings: list[str], trained: Path) -> None:
    before = sorted(path.name for path in home.iterdir())
    found = run("probe", *settings, "--json").json
    assert sorted(path.name for path in home.iterdir()) == before  # no run folder
    assert found["loss"] == pytest.approx(LN2, rel=1e-6)
    assert found["grad_norm"] == pytest.approx(math.sqrt(sum(n**2 for n in found["grad_norms"].values())), rel=1e-9)
    assert found["totals"]["pair"] == found["examples"] == 4
    assert "model.embed_tokens.weight" in found["grad_norms"]
    first = records(trained / "metrics.jsonl")[0]
    assert found["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)  # both before clipping at 1
    assert found["grad_norm"] > 1
    for name, value in found["metrics"].items():
        assert value == pytest.approx(first[name], rel=1e-5, abs=1e-6)
    assert "norm" in run("probe", *settings).out


def test_show_says_who_set_each_key(run: Run, settings: list[str]) -> None:
    found = run("show", *settings, "--json").json
    assert found["config"]["train.max_steps"] == 4
    assert found["provenance"]["train.max_steps"] == "command line"
    assert found["provenance"]["objective.beta"] == "conf/objective/dpo.yaml"
    assert found["name"].startswith("dpo-small-sums-")
    assert found["missing"] == []


def test_env(run: Run, home: Path) -> None:
    found = run("env", "--json").json
    assert found["packages"]["torch"]
    assert found["environment"]["ALIGNLAB_CACHE"] == str(home / "cache")
    assert found["cache"]["path"] == str(home / "cache")


@pytest.mark.parametrize(("code", "expected"), [(0, ["NVIDIA H100, 81559 MiB, 580.1"] * 2), (9, [])])
def test_gpus_are_named_by_the_drivers_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: list[str]
) -> None:
    # 9 is what nvidia-smi leaves with where no driver answers; its words go to standard output too.
    tool = tmp_path / "nvidia-smi"
    line = "echo 'NVIDIA H100, 81559 MiB, 580.1'\n"
    tool.write_text(f"#!/bin/sh\n{line}{line}exit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert collect()["gpus"] == expected


def test_without_the_drivers_tool_no_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []


def test_an_answer_that_cannot_be_written_is_one_line(run: Run, home: Path) -> None:
    (home / "file").write_text("kept")
    answer = run("env", f"--json={home}/file/answer.json")
    assert answer.code == StorageError.exit_code
    assert f"--json: {home}/file/answer.json cannot be written" in answer.err
    assert len(answer.err.splitlines()) == 1
    assert (home / "file").read_text() == "kept"


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def test_train_prints_ten_lines_and_fills_the_run_folder(run: Run, home: Path, settings: list[str]) -> None:
    answer = run("train", *settings, "run.name=lines", "data.options={rows: 20, eval_rows: 4}", "train.export_steps=2")
    heads = [line.split()[0] for line in answer.out.splitlines()]
    assert heads == ["run", "object", "data", "masks", "model", "batch", "1/4", "2/4", "3/4", "4/4", "done"]
    assert answer.err == ""
    folder = home / "runs" / "lines"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"run.yaml", "status.json", "env.json", "metrics.jsonl", "log.txt", "data", "checkpoints", "model"}
    assert {path.name for path in (folder / "data").iterdir()} == {
        "findings.jsonl", "manifest.json", "rejected.jsonl", "samples.txt",
    }  # fmt: skip
    assert [path.name for path in (folder / "exports").iterdir()] == ["step-2"]
    assert (folder / "checkpoints" / "checkpoint-4" / "MANIFEST.json").is_file()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"], status["attempt"]) == ("done", 0, 4, 1)
    found = records(folder / "metrics.jsonl")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert found[0]["loss"] == pytest.approx(LN2, rel=1e-6)
    assert found[0]["learning_rate"] == 0.0  # the first of ceil(0.1 x 4) = 1 warm-up steps
    assert found[1]["learning_rate"] == pytest.approx(1e-2)
    assert {"grad_norm", "num_tokens", "epoch", "rewards/accuracies", "rewards/margins"} <= set(found[0])
    assert found[-1]["epoch"] == pytest.approx(4 * 4 / 20)


def test_the_same_command_again_says_finished(run: Run, settings: list[str], trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    answer = run("train", *settings, "run.name=whole")
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    assert "finished" in answer.out
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before
    found = run("train", *settings, "run.name=whole", "--json").json
    assert (found["state"], found["exit_code"], found["step"]) == ("done", 0, 4)


def test_train_json_is_one_object(home: Path, settings: list[str]) -> None:
    """On the real standard output of a real process; the lines for people are on standard error."""
    command = [sys.executable, "-m", "alignlab", "train", *settings, "run.name=object", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=home, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["state"], found["step"]) == (0, "done", 4)
    assert [line.split()[0] for line in done.stderr.splitlines()][:2] == ["run", "object"]
    assert "done" in done.stderr


def test_a_fork_does_what_a_process_does(start: Callable[..., forks.Started], home: Path, settings: list[str]) -> None:
    """To the last bit; most tests that start a command start a fork (``tests/forks.py``)."""
    real = home / "runs" / "object" / "metrics.jsonl"
    if not real.exists():
        command = [sys.executable, "-m", "alignlab", "train", *settings, "run.name=object"]
        subprocess.run(command, capture_output=True, timeout=200, cwd=home, check=True)
    process = start("train", *settings, "run.name=forked", "--json")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, json.loads(out)["state"]) == (0, "done")
    assert [line.split()[0] for line in err.splitlines()][:2] == ["run", "object"]
    assert numbers(records(home / "runs" / "forked" / "metrics.jsonl")) == numbers(records(real))
    weights = [home / "runs" / name / "model" / "model.safetensors" for name in ("forked", "object")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# After training
# ---------------------------------------------------------------------------------------------------------------


def test_evaluate_gives_what_training_ended_with(run: Run, trained: Path) -> None:
    found = run("evaluate", str(trained), "eval.generate=2", "eval.max_new_tokens=4", "--json").json
    after = json.loads((trained / "result.json").read_text())["after"]
    assert after["eval_loss"] != pytest.approx(LN2, rel=1e-3)
    for name, value in after.items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert len(found["answers"]) == 2
    assert found["metrics"]["eval_correct"] in (0.0, 0.5, 1.0)  # the verifier's, of two answers
    (written,) = (trained / "eval").glob("sums-dpo-*.json")
    assert json.loads(written.read_text())["metrics"] == found["metrics"]
    start = run("evaluate", str(trained), "model=" + str(trained.parent.parent / "x"), "--json")
    assert start.code == 2  # a run's model cannot be replaced by one that is not there


def test_evaluate_of_a_bare_model(run: Run, settings: list[str], small_model: Path, trained: Path) -> None:
    """The initial policy against itself: every implicit reward is 0 and the loss is ln 2."""
    words = [word for word in settings if not word.startswith("model=")]
    found = run("evaluate", str(small_model), *words, "--json").json["metrics"]
    assert found["eval_loss"] == pytest.approx(LN2, rel=1e-6)
    before = json.loads((trained / "result.json").read_text())["before"]
    assert found["eval_logps/chosen"] == pytest.approx(before["eval_logps/chosen"], rel=1e-5)


def test_sample_answers_prompts(run: Run, trained: Path) -> None:
    words = ["eval.generate=3", "eval.max_new_tokens=6", "--json"]
    found = run("sample", str(trained), *words).json["answers"]
    assert len(found) == 3
    assert all(len(answer["texts"]) == 1 and answer["prompt"][-1]["role"] == "user" for answer in found)
    assert run("sample", str(trained), *words, "eval.batch_size=1").json["answers"] == found  # greedy, batch-free
    options = ["eval.prompt=How many now?", "eval.max_new_tokens=8", "eval.num_samples=3", "eval.temperature=1.5"]
    drawn = run("sample", str(trained), *options, "--json").json["answers"]
    assert len(set(drawn[0]["texts"])) > 1
    assert run("sample", str(trained), *options, "--json").json["answers"] == drawn  # by the seed
    lines = run("sample", str(trained / "model"), *words[:2]).out.splitlines()
    assert [json.loads(line)["texts"] for line in lines] == [answer["texts"] for answer in found]


def test_export_of_a_finished_run_is_its_model(run: Run, home: Path, trained: Path) -> None:
    assert run("export", str(trained), "--json").json == {"model": str(trained / "model")}
    found = run("export", str(trained), "output_dir=copied", "--json").json
    assert found == {"model": "copied"}
    names = sorted(path.name for path in (trained / "model").iterdir())
    assert sorted(path.name for path in (home / "copied").iterdir()) == names
    assert run("export", str(trained), "output_dir=copied").code == 2


# ---------------------------------------------------------------------------------------------------------------
# Stopped and gone on with
# ---------------------------------------------------------------------------------------------------------------

LONG = ["train.max_steps=40", "data.options={rows: 32, eval_rows: 4}"]


def stop_in_the_middle(process: forks.Started, folder: Path) -> tuple[int, int]:
    """SIGTERM after the third step: (exit code, steps done)."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(records(folder / "metrics.jsonl")) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert "the same command goes on" in err
    done = records(folder / "metrics.jsonl")
    return process.returncode, len(done)


@pytest.fixture
def unbroken(start: Callable[..., forks.Started], home: Path, settings: list[str]) -> list[dict[str, Any]]:
    """The steps of the long run without a stop."""
    folder = home / "runs" / "unbroken"
    if not folder.exists():
        process = start("train", *settings, *LONG, "run.name=unbroken")
        assert process.wait(200) == 0
    return records(folder / "metrics.jsonl")


def numbers(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "rewards/margins", "learning_rate", "num_tokens")
    return [tuple(record[key] for key in keys) for record in found]


def test_sigterm_saves_and_the_same_command_goes_on(
    start: Callable[..., forks.Started], run: Run, home: Path, settings: list[str],
    unbroken: list[dict[str, Any]],
) -> None:  # fmt: skip
    folder = home / "runs" / "stopped"
    words = ["train", *settings, *LONG, "run.name=stopped"]
    code, done = stop_in_the_middle(start(*words), folder)
    status = json.loads((folder / "status.json").read_text())
    assert (code, status["state"], status["exit_code"], status["step"]) == (75, "preempted", 75, done)
    assert 3 <= done < 40
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"checkpoint-{done}"]
    assert not (folder / "model").exists()

    exported = run("export", str(folder), "--json").json["model"]
    assert exported == str(folder / "exports" / f"step-{done}")
    assert (Path(exported) / "model.safetensors").is_file()

    process = start(*words)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    assert f"(resumed at {done})" in out
    assert "cached (0 s)" in out  # the reference is the policy the run began with, not the resumed one
    found = records(folder / "metrics.jsonl")
    assert {record["attempt"] for record in found} == {1, 2}
    assert numbers(found) == numbers(unbroken)
    margins, straight = (read_margins(home / "runs" / name / "ledger") for name in ("stopped", "unbroken"))
    assert len(margins) == 40 * 4
    assert margins.equals(straight)


@pytest.mark.nightly  # of the chaos tests' kind: two launches of torchrun
def test_sigterm_to_two_ranks(
    start: Callable[..., forks.Started], home: Path, settings: list[str], unbroken: list[dict[str, Any]]
) -> None:
    folder = home / "runs" / "two"
    words = ["train", *settings, *LONG, "run.name=two", "engine=zero2", "launch.nproc=2"]
    code, done = stop_in_the_middle(start(*words), folder)
    status = json.loads((folder / "status.json").read_text())
    assert (code, status["state"], status["step"]) == (75, "preempted", done)
    assert 3 <= done < 40
    process = start(*words, "--json")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, json.loads(out)["state"]) == (0, "done")
    assert f"(resumed at {done})" in err
    found = records(folder / "metrics.jsonl")
    assert [record["step"] for record in found] == list(range(1, 41))
    for record, other in zip(found, unbroken, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
