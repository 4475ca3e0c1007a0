"""Two runs in one folder: the second is told who is there; of eight at once one runs; the dead are taken over."""

from __future__ import annotations

import os
import signal
import socket
import time
from functools import partial
from typing import Any

from harness import Harness, Started
from moments import logged, until_gone, until_step
from run import Case
from shard_orphans import snapshot
from straight import straight

STEPS, LONG = 12, 5000


def refused(started: Started, owner: int) -> float:
    """Exit code 6 within 20 s, naming process and host."""
    begun = time.monotonic()
    code = started.wait(20)
    assert code == 6, f"{code}: {started.tail()}"
    assert f"process {owner} on {socket.gethostname()}" in started.tail(), started.tail()
    return time.monotonic() - begun


def second(real: bool, harness: Harness) -> dict[str, Any]:
    """A runs; B comes, is refused, and A does not notice."""
    expected = straight(harness, "zero2", steps=40, save_steps=10)
    run = harness.run("zero2", steps=40, save_steps=10, real=real)
    first = run.start()
    until_step(run, first, 3)
    seconds = refused(run.start(), first.pid)
    assert first.wait() == 0, first.tail()
    assert run.outcome() == expected
    assert run.status()["attempt"] == 1
    return {"seconds": round(seconds, 2), "real": real}


def eight(harness: Harness) -> dict[str, Any]:
    """Eight starts in the same moment: one owner, seven that are refused."""
    run = harness.run("zero2", steps=LONG, save_steps=100)
    starts = [run.start() for _ in range(8)]
    begun = time.monotonic()
    while sum(started.poll() is None for started in starts) > 1:
        assert time.monotonic() - begun < 60, "they do not end"
        time.sleep(0.02)
    winners = [started for started in starts if started.poll() is None]
    codes = sorted(started.wait() for started in starts if started not in winners)
    assert (len(winners), codes) == (1, [6] * 7), f"{len(winners)} winners, {codes}"
    until_step(run, winners[0], 1)
    assert winners[0].kill("launcher", signal.SIGTERM)
    assert winners[0].wait() == 75, winners[0].tail()
    assert run.status()["attempt"] == 1
    run.curve()
    return {"seconds": round(time.monotonic() - begun, 1)}


def dead(harness: Harness) -> dict[str, Any]:
    """SIGKILL A, start B at once: B wins and goes on."""
    expected = straight(harness, "zero2", steps=STEPS, save_steps=2)
    run = harness.run("zero2", steps=STEPS, save_steps=2)
    first = run.start()
    until_step(run, first, 5)
    assert first.kill("launcher")
    first.wait()
    assert run.finish() == expected
    assert run.status()["attempt"] == 2
    return {}


def restarted(harness: Harness) -> dict[str, Any]:
    """The same cluster job, started again, takes over at once; the first start, stopped and woken, ends its ranks."""
    expected = straight(harness, "zero2", steps=STEPS, save_steps=2)
    run = harness.run("zero2", steps=STEPS, save_steps=2)
    job = {"SLURM_JOB_ID": "4711"}
    first = run.start(**job, SLURM_RESTART_COUNT="0", fault="in_forward:sleep_0.05@rank*:step*")
    until_step(run, first, 5)
    pids = first.pids()
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    again = run.start(**job, SLURM_RESTART_COUNT="1")
    until_step(run, again, logged(run) + 1)
    os.kill(first.pid, signal.SIGCONT)  # its ranks stay stopped: they are ended as they are
    assert first.wait(30) == 6, first.tail()
    until_gone(pids, 5.0)
    assert again.wait() == 0, again.tail()
    assert run.outcome() == expected
    assert run.status()["attempt"] == 2
    return {}


def finished(harness: Harness) -> dict[str, Any]:
    """A finished run says so, and is left as it is."""
    run = harness.run("zero2", steps=4, save_steps=2)
    run.finish()
    before = snapshot(run)
    started = run.start()
    assert started.wait() == 0
    assert "(finished)" in started.tail(), started.tail()
    changed = {name for name, value in snapshot(run).items() if before.get(name) != value} - {"."}
    assert not changed, changed
    return {}


def cases() -> list[Case]:
    """20 times eight, and what else can meet."""
    return [
        *(Case(f"eight-{n:02d}", eight) for n in range(20)),
        Case("second-start", partial(second, False)),
        Case("second-start-torchrun", partial(second, True)),
        Case("dead-owner", dead),
        Case("slurm-restart", restarted),
        Case("finished", finished),
    ]
