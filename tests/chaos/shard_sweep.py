"""A sweep of six points, of which one is not finite, one has no valid configuration and one is killed."""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import Harness, Run
from run import Case

RATES = ("1e-3", "1e30", "5e-4", "-1", "2e-4", "1e-4")
NOT_FINITE, INVALID, KILLED = 1, 3, 4
DONE = (0, 2, 5)
STEPS = 8


def survived(harness: Harness) -> dict[str, Any]:
    """Three are done, the table says exactly what became of the others, and a second sweep runs only those."""
    run = harness.run("local", ranks=1, steps=STEPS, save_steps=2)
    run.folder.mkdir(parents=True)
    code, rows = _sweep(run, kill=KILLED)
    assert code == 1, code
    states = [(row["status"], int(row["exit_code"])) for row in rows]
    expected = [("done", 0)] * len(RATES)
    expected[NOT_FINITE], expected[INVALID] = ("failed", 3), ("failed", 2)
    assert states[KILLED][0] == "failed", states
    assert states[KILLED][1] in (-9, 137, 5), states
    expected[KILLED] = states[KILLED]
    assert states == expected, states
    before = {number: _contents(run.folder / "sweeps" / "run" / f"{number:03d}") for number in DONE}
    code, rows = _sweep(run)
    assert code == 1, code
    expected[KILLED] = ("done", 0)
    assert [(row["status"], int(row["exit_code"])) for row in rows] == expected, rows
    after = {number: _contents(run.folder / "sweeps" / "run" / f"{number:03d}") for number in DONE}
    assert after == before, "a finished point was touched"
    return {"first": states}


def _sweep(run: Run, kill: int | None = None) -> tuple[int, list[dict[str, str]]]:
    settings = [word for word in run.settings if not word.startswith("optim.learning_rate=")]
    command = [sys.executable, "-m", "alignlab", "train", "-m", *settings, f"optim.learning_rate={','.join(RATES)}"]
    environment = {**os.environ, **run.harness.environment}
    with (run.folder / "sweep.txt").open("ab") as log:
        child = subprocess.Popen(command, cwd=run.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        killed = kill is None
        while child.poll() is None:
            if not killed:
                killed = _kill(run.folder / "sweeps" / "run" / f"{kill:03d}")
            time.sleep(0.01)
    with (run.folder / "sweeps" / "run" / "results.csv").open() as stream:
        return child.returncode, list(csv.DictReader(stream))


def _kill(point: Path) -> bool:
    """SIGKILL the owner of a point's folder when it has done a step; whether that was so."""
    try:
        if '"step": 1' not in (point / "metrics.jsonl").read_text():
            return False
        owner = int((point / "owner.lock").read_text().partition('"pid": ')[2].partition(",")[0])
    except (OSError, ValueError):
        return False
    os.kill(owner, signal.SIGKILL)
    return True


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cases() -> list[Case]:
    """One."""
    return [Case("three-of-six", survived)]
