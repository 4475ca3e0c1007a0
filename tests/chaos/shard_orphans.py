"""SIGKILL of the launcher or the agent: no rank outlives it by 5 s, and nobody writes into the run any more."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

from harness import Harness, Run
from moments import somewhere, until_all_run, until_gone
from run import Case

LIMIT = 5.0
TRIALS, REAL = 20, (0, 5, 10, 15)
ENGINES = ("zero2", "zero3", "zero1", "zero0")


def snapshot(run: Run) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in the run folder."""
    return {
        str(p.relative_to(run.path)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(run.path.rglob("*"))
    }


def orphaned(number: int, harness: Harness) -> dict[str, Any]:
    """One case."""
    draw = random.Random(number)
    target, real = ("launcher", "agent")[number % 2], number in REAL
    run = harness.run(ENGINES[number % len(ENGINES)], steps=2000, save_steps=2, real=real)
    started = run.start()
    until_all_run(started)
    moment = somewhere(run, started, draw, within=8, early=0.3)
    pids = started.pids()
    assert {"0", "1"} <= set(pids), pids
    assert started.kill(target)
    seconds = until_gone(pids, LIMIT)
    before = snapshot(run)
    time.sleep(LIMIT)
    assert snapshot(run) == before, "somebody wrote into the run folder"
    return {"target": target, "moment": moment, "real": real, "seconds": round(seconds, 3)}


def cases() -> list[Case]:
    """20."""
    return [
        Case(f"{n:02d}-{('launcher', 'agent')[n % 2]}{'-torchrun' if n in REAL else ''}", partial(orphaned, n))
        for n in range(TRIALS)
    ]
