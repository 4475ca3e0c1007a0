"""Trackers and hubs that are down: the run goes on with the same curve, a little later at most."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import Harness, Run
from run import Case
from stub import Silent, Tracker

CLOSED = "http://127.0.0.1:1"
KEY = "a" * 40
STEPS = 8
LATER, AT_END, MISSING = 20.0, 30.0, 60.0
"""Seconds: how much later a run may start, how long its end may take, how long a name that is nowhere may take."""


def cases() -> list[Case]:
    """Five of trackers, four of the hub."""
    trials: dict[str, Callable[[Harness], dict[str, Any]]] = {
        "wandb-closed": partial(_unreachable, False),
        "wandb-silent": partial(_unreachable, True),
        "wandb-dies": _dies,
        "tensorboard-unwritable": _unwritable,
        "tracker-raises": _raises,
        "hub-closed-local": partial(_local, False),
        "hub-silent-local": partial(_local, True),
        "hub-closed-missing": partial(_missing, False),
        "hub-silent-missing": partial(_missing, True),
    }
    return [Case(name, run) for name, run in trials.items()]


def _make(harness: Harness, *more: str, real: bool = False) -> Run:
    return harness.run("local", *more, ranks=1, steps=STEPS, save_steps=100, real=real)


def _finished(run: Run, **environment: str) -> tuple[float, float]:
    """Seconds to the first step and to the end of a run that has to succeed."""
    begun = time.time()
    process = run.start(**environment)
    code = process.wait()
    ended = time.time()
    assert code == 0, process.tail()
    return run.rows()[0]["time"] - begun, ended - begun


def _alone(harness: Harness) -> tuple[dict[str, Any], float, float]:
    """(outcome, seconds to the first step, seconds) of the run without any service; made once."""
    known = vars(harness).setdefault("without_services", [])
    if not known:
        _finished(_make(harness))  # the first one fills the cache
        run = _make(harness)
        seconds = _finished(run)
        known.append((run.outcome(), *seconds))
    return known[0]


def _said(run: Run) -> str:
    return (run.folder / "start-1.txt").read_text()


def _unreachable(silent: bool, harness: Harness) -> dict[str, Any]:
    outcome, first, _ = _alone(harness)
    run = _make(harness, "logger=[jsonl,wandb]")
    with Silent() as server:
        url = server.url if silent else CLOSED
        started, whole = _finished(run, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
        assert bool(server.connections) == silent
    assert run.outcome() == outcome
    assert started - first <= LATER, (started, first)
    line = next(line for line in _said(run).splitlines() if line.startswith("wandb"))
    assert "cannot be reached" in line
    assert "writing offline; later: wandb sync " in line
    folder = Path(line.partition("wandb sync ")[2])
    assert list((run.folder / folder).glob("*.wandb")), "nothing there to sync"
    return {"later": round(started - first, 1), "seconds": round(whole, 1)}


def _dies(harness: Harness) -> dict[str, Any]:
    outcome, first, _ = _alone(harness)
    run = _make(harness, "logger=[jsonl,wandb]")
    with Tracker() as server:
        begun = time.time()
        process = run.start(fault="forward:slow@rank0:step*", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        while len(run.rows()) < 2 and process.poll() is None:
            time.sleep(0.02)
        server.die()
        died = time.time()
        code = process.wait()
        ended = time.time()
        assert server.asked, "the tracker was never reached"
    assert code == 0, process.tail()
    assert ended - died <= STEPS * 0.25 + AT_END, ended - died
    assert run.rows()[0]["time"] - begun - first <= LATER
    assert run.outcome() == outcome
    assert "not all was sent within" in _said(run)
    assert "wandb sync " in _said(run)
    return {"end": round(ended - died, 1)}


def _unwritable(harness: Harness) -> dict[str, Any]:
    outcome, _, _ = _alone(harness)
    run = _make(harness, "logger=[jsonl,tensorboard]")
    assert run.start(fault="forward:kill@rank0:step3").wait() != 0
    folder = run.path / "tensorboard"
    assert list(folder.glob("events*")), "without a fault it writes"
    shutil.rmtree(folder)
    folder.write_text("a file in the folder's place")
    assert run.finish() == outcome
    assert (run.folder / "start-2.txt").read_text().count("tensorboard cannot be used") == 1
    return {}


def _raises(harness: Harness) -> dict[str, Any]:
    outcome, _, _ = _alone(harness)
    run = _make(harness, "logger=[jsonl,tensorboard]")
    process = run.start(fault="tracker:raise@rank0:step*")
    assert process.wait() == 0, process.tail()
    assert run.outcome() == outcome
    said = _said(run)
    assert said.count("the run goes on") == 1, said
    assert f"{STEPS + 2} of {STEPS + 2} records were not taken" in said, said
    return {}


def _local(silent: bool, harness: Harness) -> dict[str, Any]:
    """Local assets, and a hub that does not answer.  In processes of their own, as below."""
    known = vars(harness).setdefault("own_process", [])
    if not known:
        runs = [_make(harness, real=True) for _ in range(2)]
        known.append((min(_finished(run)[0] for run in runs), runs[0].outcome()))
    first, outcome = known[0]
    later = []
    with Silent() as server:
        for _ in range(2):
            run = _make(harness, real=True)
            started, _ = _finished(run, HF_ENDPOINT=server.url if silent else CLOSED, HF_HUB_OFFLINE="0")
            later.append(started - first)
            assert run.outcome() == outcome
        assert not server.connections, f"{len(server.connections)} connections to the hub"
    assert min(later) <= 1.0, later
    return {"later": round(min(later), 2)}


def _missing(silent: bool, harness: Harness) -> dict[str, Any]:
    """A model and a data set that are nowhere.  In a process of its own: the hub's client reads its address once."""
    found: dict[str, Any] = {}
    with Silent() as server:
        environment = {"HF_ENDPOINT": server.url if silent else CLOSED, "HF_HUB_OFFLINE": "0"}
        for what, name in (("model", "nobody/nothing"), ("data", "nobody/no-rows")):
            run = harness.run("local", f"{what}={name}", ranks=1, steps=1, real=True)
            if what == "data":
                run.settings = [one for one in run.settings if not one.startswith(("data=sums", "data.options"))]
            run.settings = [one for one in run.settings if what != "model" or not one.startswith("model=/")]
            begun = time.monotonic()
            process = run.start(**environment, HF_HOME=str(run.folder / "hf"))
            code = process.wait()
            found[what] = round(time.monotonic() - begun, 1)
            lines = [line for line in process.tail().splitlines() if line.startswith("alignlab: ")]
            assert (code, len(lines)) == (2, 1), process.tail()
            assert name in lines[0], lines
            assert found[what] <= MISSING, found
        assert len(server.connections) > 0 if silent else not server.connections
    return found
