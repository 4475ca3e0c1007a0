"""A recipe whose trainings are batch jobs: each is submitted, and the same command goes on when its job has ended.

The batch system is a stand-in: ``sbatch`` keeps the script, ``srun`` runs its command; the job is run by the test.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import Preempted

Run = Callable[..., Any]

RECIPE = """
title: two trainings in jobs of their own
settings: {{model: {model}, data: sums, data.options.rows: 24, data.options.eval_rows: 4, launch: sbatch,
           launch.nproc: 1, engine: local, train.global_batch_size: 4, train.max_steps: 2}}
stages:
  sft: {{train: {{objective: sft}}}}
  dpo: {{start: sft, train: {{objective: dpo}}}}
metrics:
  loss: {{say: "held-out loss", value: dpo.after.eval_loss}}
"""
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture
def queue(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the stand-in for ``sbatch`` puts scripts into, ``1.sh`` first."""
    tools, queue = home / "bin", home / "queue"
    tools.mkdir()
    queue.mkdir()
    commands = {
        "sbatch": f'n=$(( $(ls {queue} | wc -l) + 1 )); cp "$2" {queue}/$n.sh; echo "47$n"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',  # its own options away
        "scontrol": "exit 1",
    }
    for name, text in commands.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return queue


def carry_out(script: Path) -> None:
    """What the batch system does when the job's turn has come."""
    job = subprocess.run(
        ["bash", str(script)], env={**os.environ, **JOB, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr


def test_every_training_is_a_job(run: Run, home: Path, queue: Path, small_model: Path) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "paper.yaml").write_text(RECIPE.format(model=small_model))
    words = ("reproduce", "./mine", "scale=paper", "execute=true")
    first = run(*words)
    assert first.code == Preempted.exit_code, first.err
    assert "job 471 is submitted; the same command goes on after it" in first.out
    again = run(*words)  # too early: nothing is submitted twice, and what needs the job waits for it
    assert again.code == Preempted.exit_code
    assert [one.name for one in queue.iterdir()] == ["1.sh"]
    carry_out(queue / "1.sh")
    second = run(*words)
    assert second.code == Preempted.exit_code
    assert "job 472 is submitted" in second.out
    carry_out(queue / "2.sh")
    last = run(*words)
    assert last.code == 0, last.err
    assert sorted(one.name for one in queue.iterdir()) == ["1.sh", "2.sh"]
    assert "held-out loss" in last.out
