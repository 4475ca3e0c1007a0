"""Rank 1 sleeps, is stopped, leaves or fails, in every phase: the job ends in time and says who, when and where."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from harness import Harness
from moments import until_gone
from run import Case

TIMEOUT = 10.0
STEP = 3
PHASES = {
    "forward": "in_forward",
    "backward": "in_backward",
    "data": "in_data",
    "eval": "in_eval",
    "save": "after_shard",
}
ACTIONS = ("sleep", "stop", "exit", "raise")
ENGINES = ("zero2", "zero3", "zero1", "zero0")


def lost(
    action: str, phase: str, engine: str, harness: Harness, *, timeout: float = TIMEOUT, real: bool = False
) -> dict[str, Any]:
    """One case."""
    every = f"train.eval_steps={STEP}", f"engine.timeout={timeout}"
    run = harness.run(engine, *every, steps=8, save_steps=STEP, real=real)
    started = run.start(fault=f"{PHASES[phase]}:{action}@rank1:step{STEP}")
    begun: float | None = None
    pids: dict[str, int] = {}
    while started.poll() is None:
        pids |= started.pids()
        if begun is None and (run.rows() and run.rows()[-1]["step"] >= STEP - 1):
            begun = time.monotonic()
        if begun is not None and time.monotonic() - begun > timeout + 30:
            started.kill_all()
            raise AssertionError(f"the job still runs after {timeout + 30} s: {started.tail()}")
        time.sleep(0.02)
    assert begun is not None, f"the run ended before step {STEP}: {started.tail()}"
    seconds = time.monotonic() - begun
    until_gone(pids, 2.0)
    code, status = started.wait(), run.status()
    facts = {"code": code, "seconds": round(seconds, 1), "error": status["error"][:200]}
    done = STEP if phase in ("eval", "save") else STEP - 1
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", code, done), status
    if action == "raise":
        assert code == (4 if phase == "save" else 70), facts
        assert "rank 1" in status["error"], facts
        assert phase == "save" or f"step {STEP}, {phase}" in status["error"], facts
        return facts
    how = "ended with exit code 3" if action == "exit" else "hung"
    assert code == 5, facts
    named = {key: status["lost"][key] for key in ("rank", "step", "phase", "how")}
    assert named == {"rank": 1, "step": STEP, "phase": phase, "how": how}, status
    assert f"rank 1 {how} at step {STEP}, {phase}" in started.tail(), started.tail()
    return facts


def cases() -> list[Case]:
    """20, and two with torchrun itself."""
    found = [
        Case(f"{action}-{phase}-{ENGINES[(a + p) % 4]}", partial(lost, action, phase, ENGINES[(a + p) % 4]))
        for a, action in enumerate(ACTIONS)
        for p, phase in enumerate(PHASES)
    ]
    real = [
        Case(f"{action}-forward-zero2-torchrun", partial(lost, action, "forward", "zero2", real=True))
        for action in ("stop", "exit")
    ]
    return [*found, *real]
