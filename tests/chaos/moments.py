"""When to strike: seeded moments of a run, tied to what it has done and not to the clock, so that load shifts none."""

from __future__ import annotations

import random
import time

from harness import Run, Started, alive

ROLES = ("launcher", "agent", "0", "1")


def logged(run: Run) -> int:
    """The last step in metrics.jsonl; 0 before the first."""
    return max((int(row["step"]) for row in run.rows()), default=0)


def until_step(run: Run, started: Started, step: int, timeout: float = 120.0) -> None:
    """Wait until ``step`` is logged; AssertionError where the run ends before."""
    deadline = time.monotonic() + timeout
    while logged(run) < step:
        if started.poll() is not None:
            raise AssertionError(f"the run ended with {started.poll()} before step {step}: {started.tail()}")
        if time.monotonic() > deadline:
            started.kill_all()
            raise TimeoutError(f"step {step} was not reached in {timeout} s: {started.tail()}")
        time.sleep(0.005)


def until_all_run(started: Started, ranks: int = 2, timeout: float = 60.0) -> dict[str, int]:
    """Wait until launcher, agent and all ranks are there; their process ids."""
    deadline = time.monotonic() + timeout
    while len(found := started.pids()) < ranks + 2:
        if started.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the processes never came: {found}: {started.tail()}")
        time.sleep(0.005)
    return found


def until_gone(pids: dict[str, int], timeout: float) -> float:
    """Wait until none of the processes lives; seconds it took, AssertionError with the survivors after ``timeout``."""
    begun = time.monotonic()
    while left := {role: pid for role, pid in pids.items() if alive(pid)}:
        if time.monotonic() - begun > timeout:
            raise AssertionError(f"after {timeout} s there still live {left}")
        time.sleep(0.01)
    return time.monotonic() - begun


def somewhere(run: Run, started: Started, draw: random.Random, within: int, early: float = 0.15) -> str:
    """Let the run come to a random moment of its next ``within`` steps, or of its start-up; what was drawn."""
    if draw.random() < early:
        seconds = draw.uniform(0.2, 5.0 if run.real else 1.0)
        time.sleep(seconds)
        return f"{seconds:.2f} s after the start"
    first = logged(run)
    step = first + draw.randint(1, within)
    until_step(run, started, step)
    time.sleep(draw.uniform(0.0, 0.15))
    return f"step {step}"
