"""50 stop signals at random moments to one process of a run, and the harder ones: early, twice, in a long save."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from typing import Any

from harness import Harness, Run, Started
from moments import ROLES, logged, until_all_run, until_step
from run import Case
from straight import straight

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
ENGINES = ("zero2", "zero3", "zero1", "zero0")
STEPS, EVERY = 24, 100
"""No checkpoint but those that the signals make, and the last."""
TRIALS, REAL = 50, (3, 10, 17, 24, 36, 45)
SLOW = "after_shard:slow@rank*:step*;before_rename:slow@rank0:step*"


def preempted(run: Run, started: Started, timeout: float = 60.0) -> None:
    """The run has ended as one that was asked to stop, with nothing lost."""
    code = started.wait(timeout)
    status, newest = run.status(), max(run.checkpoints(), default=0)
    assert (code, status["state"], status["exit_code"]) == (75, "preempted", 75), f"{code} {status}: {started.tail()}"
    assert newest == logged(run) == status["step"], f"checkpoint {newest}, logged {logged(run)}, {status}"
    assert started.pids() == {}, started.pids()


def signalled(number: int, harness: Harness) -> dict[str, Any]:
    """One of the 50."""
    draw = random.Random(number)
    engine, real = ENGINES[number % len(ENGINES)], number in REAL
    sent, role = SIGNALS[number % len(SIGNALS)], ROLES[number // len(SIGNALS) % len(ROLES)]
    expected = straight(harness, engine, steps=STEPS, save_steps=EVERY)
    run = harness.run(engine, steps=STEPS, save_steps=EVERY, real=real)
    started = run.start(fault="in_forward:sleep_0.05@rank*:step*")
    until_step(run, started, draw.randint(1, STEPS // 2))
    time.sleep(draw.uniform(0.0, 0.1))
    assert started.kill(role, sent)
    preempted(run, started)
    at = logged(run)
    outcome = run.finish()
    assert outcome == expected, f"{outcome}\nand, straight, {expected}"
    return {"signal": sent.name, "role": role, "step": at, "real": real, "engine": engine}


def early(role: str, after: float, real: bool, harness: Harness) -> dict[str, Any]:
    """In the imports, or anywhere before the first step: preempted, nothing to save, no hang."""
    expected = straight(harness, "zero2", steps=STEPS, save_steps=EVERY)
    run = harness.run("zero2", steps=STEPS, save_steps=EVERY, real=real)
    started = run.start(fault="loading:slow@rank*:step*")
    if role != "launcher":
        until_all_run(started)
    time.sleep(after)
    assert started.kill(role, signal.SIGTERM)
    code = started.wait(60)
    status = run.status()
    assert code == 75, f"{code} {status}: {started.tail()}"
    assert status.get("state") == "preempted", status
    assert (run.checkpoints(), logged(run)) == ([], 0), "a step was done"
    assert run.finish() == expected
    return {"role": role, "after": after, "real": real}


def twice(sent: signal.Signals, real: bool, everyone: bool, harness: Harness) -> dict[str, Any]:
    """More signals while the save goes on, to all processes as a cluster sends them: the save is finished."""
    expected = straight(harness, "zero2", steps=STEPS, save_steps=EVERY)
    run = harness.run("zero2", steps=STEPS, save_steps=EVERY, real=real)
    started = run.start(fault=f"in_forward:sleep_0.05@rank*:step*;{SLOW}")
    until_step(run, started, 3)
    pids = started.pids()
    for _ in range(4):
        for role in pids if everyone else ["launcher"]:
            started.kill(role, sent)
        time.sleep(0.15)
    preempted(run, started)
    assert run.finish() == expected
    return {"signal": sent.name, "real": real, "everyone": everyone}


def long_save(seconds: int, real: bool, harness: Harness) -> dict[str, Any]:
    """A save that takes longer than torchrun's own patience (30 s) is waited for."""
    run = harness.run("zero2", steps=STEPS, save_steps=EVERY, real=real)
    started = run.start(fault=f"in_forward:sleep_0.05@rank*:step*;after_shard:sleep_{seconds}@rank0:step*")
    until_step(run, started, 2)
    begun = time.monotonic()
    started.kill("launcher", signal.SIGTERM)
    preempted(run, started, seconds + 60.0)
    took = time.monotonic() - begun
    assert took >= seconds, took
    return {"seconds": round(took, 1)}


def requeued(harness: Harness) -> dict[str, Any]:
    """Slurm: one task a node under a batch script; USR2 before the limit, then the job again with a higher count."""
    expected = straight(harness, "zero2", steps=STEPS, save_steps=EVERY)
    run = harness.run("zero2", "launch=slurm", steps=STEPS, save_steps=EVERY)
    job = {
        "SLURM_JOB_ID": "4711", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": os.uname().nodename, "SLURM_LOCALID": "0",
        "SLURM_STEP_ID": "0",
    }  # fmt: skip
    codes = []
    for restart in range(2):
        started = run.start(fault="in_forward:sleep_0.05@rank*:step*", **job, SLURM_RESTART_COUNT=str(restart))
        until_step(run, started, logged(run) + 4)
        assert started.kill("launcher", signal.SIGUSR2)
        preempted(run, started)
        codes.append(75)
    started = run.start(**job, SLURM_RESTART_COUNT="2")
    assert started.wait() == 0, started.tail()
    assert run.outcome() == expected
    return {"codes": [*codes, 0], "attempts": run.status()["attempt"]}


def cases() -> list[Case]:
    """50 at random moments, 8 early, 4 repeated, 1 in a save of 45 s, 1 job that is queued again."""
    found = []
    for n in range(TRIALS):
        name = f"{n:02d}-{SIGNALS[n % 4].name}-{ROLES[n // 4 % 4]}{'-torchrun' if n in REAL else ''}"
        found.append(Case(name, partial(signalled, n)))
    for role in ROLES:
        found.append(Case(f"early-{role}", partial(early, role, 0.3 if role == "launcher" else 0.05, False)))
        found.append(Case(f"early-{role}-torchrun", partial(early, role, 4.0 if role == "launcher" else 0.5, True)))
    for real in (False, True):
        for everyone in (False, True):
            sent = signal.SIGTERM if everyone else signal.SIGUSR1
            name = f"twice-{'everyone' if everyone else 'launcher'}{'-torchrun' if real else ''}"
            found.append(Case(name, partial(twice, sent, real, everyone)))
    return [*found, Case("save-of-45-s-torchrun", partial(long_save, 45, True)), Case("slurm-requeue", requeued)]
