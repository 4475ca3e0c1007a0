"""One run of 1,000 steps that is hurt again and again, restarted by nothing but the same command."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

from harness import Harness, Run
from moments import logged, until_all_run, until_step
from run import Case

STEPS, EVERY, FAULTS = 1000, 20, 24
NAN = ";".join(f"loss:nan@rank{step % 2}:step{step}" for step in (137, 404, 731))
SETTINGS = ("train.nonfinite=skip", "engine.timeout=5", "train.save_total_limit=3")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
EXPECTED = {"kill": (-9, 5), "signal": (75,), "exit": (5,), "raise": (70,), "full": (4,), "hang": (5,)}


def disturb(run: Run, kind: str, draw: random.Random, step: int) -> int:
    """One start of the run and what happens to it after ``step``; its exit code."""
    role = draw.choice(("launcher", "agent", "0", "1"))
    rank = draw.randrange(2)
    at = {
        "exit": f"in_backward:exit@rank{rank}:step{step}",
        "raise": f"in_forward:raise@rank{rank}:step{step}",
        "hang": f"in_forward:stop@rank{rank}:step{step}",
        "full": f"in_forward:limit_4096@rank1:step{step}",  # the next save finds the disk full
    }.get(kind, "")
    started = run.start(fault=";".join(filter(None, (NAN, at))))
    until_all_run(started)
    if kind in ("kill", "signal"):
        until_step(run, started, step)
        time.sleep(draw.uniform(0.0, 0.2))
        started.kill(role, signal.SIGKILL if kind == "kill" else draw.choice(SIGNALS))
    return started.wait(180)


def soaked(harness: Harness, *, steps: int = STEPS, faults: int = FAULTS) -> dict[str, Any]:
    """The case."""
    draw = random.Random(7)
    options = {"steps": steps, "save_steps": EVERY}
    expected = _straight(harness, options)
    run = harness.run("zero2", *SETTINGS, **options)
    codes: list[str] = []
    kinds = ["kill", "signal", "kill", "exit", "signal", "raise", "kill", "full", "hang"]
    for number in range(faults):
        kind = kinds[number % len(kinds)]
        step = logged(run) + draw.randint(2, steps // (faults + 2))
        code = disturb(run, kind, draw, step)
        assert code in EXPECTED[kind], f"{kind}: {code}: {run.status()}"
        codes.append(f"{kind} {code}")
    started = run.start(fault=NAN)
    assert started.wait(600) == 0, started.tail()
    outcome = run.outcome()
    assert outcome["curve"] == expected["curve"], "the curve differs"
    assert outcome == expected, f"{outcome['weights']} and, straight, {expected['weights']}"
    assert len(outcome["curve"]) == steps
    assert run.leftovers() == [], run.leftovers()
    return {"faults": len(codes), "codes": codes, "attempts": run.status()["attempt"], "steps": steps}


def _straight(harness: Harness, options: dict[str, int]) -> dict[str, Any]:
    run = harness.run("zero2", *SETTINGS, **options)
    started = run.start(fault=NAN)
    assert started.wait(600) == 0, started.tail()
    return run.outcome()


def cases() -> list[Case]:
    """One."""
    return [Case("thousand-steps", soaked)]
