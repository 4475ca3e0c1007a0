"""Work in stages, each in a folder of its own and done once: the same command goes on with the first unfinished one.

A stage that is done has ``stage.json``: its inputs, a key of them and of everything before it, its result.  One whose
inputs have changed since is never silently reused, nor thrown away.  :func:`run_stages` does a row of stages, each with
a name in one folder; :func:`run_shared` does stages that need one another in any way, several at once, in folders that
other commands may be using too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig
from alignlab.configuration import names
from alignlab.configuration.frozen import frozen_text
from alignlab.data.cache import Claim
from alignlab.durable import write_atomic
from alignlab.errors import AlignlabError, ConfigError, Preempted
from alignlab.processes import StopFlag, call
from alignlab.runfolder import FINISHED, RunFolder

RECORD = "stage.json"
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Stage:
    """One stage.  ``work(folder)`` may be called again after any interruption; it returns its result, plain JSON.

    ``inputs`` holds, as plain JSON, everything that the result depends on besides the stages before it.
    """

    name: str
    inputs: Mapping[str, Any]
    work: Callable[[Path], dict[str, Any]]


def run_stages(
    folder: Path, stages: Iterable[Stage], say: Callable[[str, bool, float], None] = lambda name, new, seconds: None
) -> dict[str, dict[str, Any]]:
    """The results by stage name.  ``say(name, new, seconds)`` is told of every stage, done now or found done.

    Raises :class:`ConfigError` where a finished stage was made from other inputs, and whatever a stage raises; the
    stages before it stay done.
    """
    results: dict[str, dict[str, Any]] = {}
    before = ""
    for stage in stages:
        place = folder / stage.name
        key = names.digest({"inputs": stage.inputs, "before": before})
        done = _done(place / RECORD)
        if done is not None and done["key"] != key:
            raise ConfigError(f"{place}: was made otherwise ({_difference(done, stage)}); remove the folder, or choose "
                              "another run.name")  # fmt: skip
        begun = time.monotonic()
        if done is None:
            place.mkdir(parents=True, exist_ok=True)
            result = stage.work(place)
            record = {"stage": stage.name, "key": key, "inputs": stage.inputs, "result": result}
            write_atomic(place / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        say(stage.name, done is None, time.monotonic() - begun)
        results[stage.name] = result if done is None else done["result"]
        before = key
    return results


@dataclass(frozen=True)
class Shared:
    """A stage in a folder that is named by a hash of all its inputs, so that equal stages are one.

    ``needs`` are the folders of the stages it comes after.  ``work(folder)`` may be called again after any
    interruption, and runs in a thread of its own; it returns plain JSON.
    """

    folder: Path
    key: str
    inputs: Mapping[str, Any]
    needs: tuple[Path, ...]
    work: Callable[[Path], dict[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)
    """what else its record shall say"""


Say = Callable[[Shared, str, float], None]
"""Told of every stage what became of it (``done``, ``done before``, ``waits for process 7 on host``, ``failed: ...``)
and the seconds that took."""


def run_shared(
    stages: Iterable[Shared], workers: int, stop: StopFlag, say: Say = lambda stage, what, seconds: None
) -> tuple[dict[Path, dict[str, Any]], dict[Path, Exception]]:
    """Do the stages, up to ``workers`` at once; (records of those done, errors of those that failed), by folder.

    A stage that another process is doing is waited for.  After a failure all goes on that does not need the failed
    stage; what needs it has its error.  Raises :class:`Preempted` once ``stop`` is set and those at work have ended.
    """
    waiting = {stage.folder: stage for stage in stages}
    done: dict[Path, dict[str, Any]] = {}
    failed: dict[Path, Exception] = {}
    running: dict[Future[dict[str, Any]], Shared] = {}
    claims: dict[Path, Claim] = {}
    with ThreadPoolExecutor(workers) as pool:
        while running or (waiting and not stop.set):
            for stage in list(waiting.values()):
                if broken := next((need for need in stage.needs if need in failed), None):
                    failed[stage.folder] = failed[broken]
                elif stop.set or any(need not in done for need in stage.needs):
                    continue
                elif (record := done_before(stage)) is not None:
                    done[stage.folder] = record
                    say(stage, "done before", 0.0)
                elif len(running) < workers and _claimed(stage, claims, say):
                    running[pool.submit(_do, stage, claims[stage.folder])] = stage
                else:
                    continue
                del waiting[stage.folder]
            time.sleep(POLL_SECONDS)
            for future in [future for future in running if future.done()]:
                stage = running.pop(future)
                try:
                    done[stage.folder] = future.result()
                    say(stage, "done", done[stage.folder]["seconds"])
                except Exception as error:
                    failed[stage.folder] = error
                    say(stage, "stopped" if isinstance(error, Preempted) else f"failed: {error}", 0.0)
    if stop.set:
        raise Preempted("stopped; the same command goes on with the first stage that is not done")
    return done, failed


def _claimed(stage: Shared, claims: dict[Path, Claim], say: Say) -> bool:
    """Whether the stage is ours to do; a try, without waiting."""
    first = stage.folder not in claims
    claim = claims.setdefault(stage.folder, Claim(stage.folder))
    if claim.take():
        return True
    if first:
        say(stage, f"waits for process {claim.holder}", 0.0)
    return False


def _do(stage: Shared, claim: Claim) -> dict[str, Any]:
    with claim:
        found = done_before(stage)  # by whoever had the claim before
        if found is not None:
            return found
        stage.folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        result = stage.work(stage.folder)
        record = {"stage": stage.folder.name, "key": stage.key, "seconds": round(time.monotonic() - begun, 1)}
        record |= {**stage.about, "inputs": stage.inputs, "result": result}
        write_atomic(stage.folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return record


def done_before(stage: Shared) -> dict[str, Any] | None:
    """The record of a stage that is done; ConfigError where its folder holds another one."""
    record = _done(stage.folder / RECORD)
    if record is not None and record["key"] != stage.key:
        raise ConfigError(f"{stage.folder}: holds another stage; remove the folder, or choose another output_dir")
    return record


def train(config: RootConfig, provenance: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Train as ``config`` says, by ``alignlab train`` in a process of its own; the run is ``folder/run``.

    What it prints goes to ``folder/train.txt``.  Raises the error that its exit code stands for.
    """
    file = folder / "train.yaml"
    write_atomic(file, frozen_text(config, provenance))
    return train_file(file, folder)


def train_file(file: Path, folder: Path, stop: StopFlag | None = None) -> dict[str, Any]:
    """The same for a file of settings; ``stop`` where this is a thread (:func:`alignlab.processes.call`)."""
    words = ["train", str(file), f"output_dir={folder}", "run.name=run"]
    console, run = folder / "train.txt", RunFolder(folder / "run")
    if run.status().get("state") == "submitted":
        raise Preempted(f"{run}: job {run.status().get('job')} has not begun; the same command goes on after it")
    code = _started(words, console, stop)
    status = run.status()
    if code or status.get("state") != FINISHED:
        if code == Preempted.exit_code:
            raise Preempted(f"{run}: stopped; the same command goes on")
        if not code and status.get("job"):
            raise Preempted(f"{run}: job {status['job']} is {status.get('state')}; the same command goes on after it")
        error = status.get("error") or _complaint(console) or f"ended with {code}"
        raise _kind_of(code)(f"{run}: {error} (all it said: {console})")
    return {"model": str(run.model), "steps": status.get("step", 0)}


def verb(words: list[str], folder: Path, stop: StopFlag | None = None) -> dict[str, Any]:
    """The ``--json`` object of an alignlab command in a process of its own; what it prints goes to ``folder``."""
    answer, console = folder / "answer.json", folder / f"{words[0]}.txt"
    return answered([sys.executable, "-m", "alignlab", *words, f"--json={answer}"], answer, console, stop)


def answered(command: list[str], answer: Path, console: Path, stop: StopFlag | None = None) -> dict[str, Any]:
    """The JSON object that a command leaves in ``answer``; raises the error that its exit code stands for."""
    answer.unlink(missing_ok=True)
    code = _start(command, console, stop)
    if code == Preempted.exit_code:
        raise Preempted(f"{console.parent}: stopped; the same command goes on")
    if code:
        error = _complaint(console) or f"ended with {code}"
        raise _kind_of(code)(f"{console.parent}: {error} (all it said: {console})")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _started(words: list[str], console: Path, stop: StopFlag | None) -> int:
    return _start([sys.executable, "-m", "alignlab", *words], console, stop)


def _start(command: list[str], console: Path, stop: StopFlag | None) -> int:
    with console.open("ab") as out:
        return call(command, {}, stdout=out, stderr=subprocess.STDOUT, stop=stop)


def _kind_of(code: int) -> type[AlignlabError]:
    return {kind.exit_code: kind for kind in AlignlabError.__subclasses__()}.get(code, AlignlabError)


def _complaint(console: Path) -> str:
    """The last thing that a command complained of."""
    lines = console.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("alignlab: ") for line in lines if line.startswith("alignlab: ")]
    return said[-1] if said else ""


def _done(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove the folder to do the stage again") from None
    return found


def _difference(done: Mapping[str, Any], stage: Stage) -> str:
    was, now = done["inputs"], json.loads(json.dumps(stage.inputs))
    parts = [f"{name} {was.get(name)} -> {now.get(name)}" for name in {**was, **now} if was.get(name) != now.get(name)]
    return "; ".join(parts[:4]) or "a stage before it was"
