"""Signs of life: every rank keeps a small record of the step it is in and of what it does there.

A rank that hangs cannot say so, and the ranks that wait for it know only that somebody is missing.  The records say
who: all ranks pass the same phases in the same order, so the one that has passed the fewest is waited for.

One record is one ``pwrite`` of some hundred bytes, not synced: microseconds.  It may fail (a full disk) and no run
fails with it.  Before :func:`start` all functions only keep the state in memory.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

SIZE = 320
"""Bytes of a record; constant, so that a new one covers the last."""


@dataclass
class Beat:
    """Where one rank is."""

    rank: int = 0
    host: str = ""
    pid: int = 0
    step: int = 0
    """the optimizer step under way, counted from 1; before the first one 0"""
    done: int = 0
    """optimizer steps done"""
    phase: str = "load"
    """load, reference, data, forward, backward, update, save, eval or export"""
    beats: int = 0
    """phases passed since the process began; comparable between ranks"""
    since: float = 0.0
    """when the phase began, in seconds since the epoch"""
    ended: bool = False
    """the rank has left the run by itself, well or with an error"""

    @property
    def place(self) -> str:
        """``step 7, forward``."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase


now = Beat()
"""This process's own."""
_file: int | None = None
_outer: str | None = None


def path_of(logs: Path, rank: int) -> Path:
    """The record of a rank."""
    return logs / f"heartbeat_{rank}.json"


def start(logs: Path, rank: int) -> None:
    """Begin anew, with a record in the folder ``logs``."""
    global now, _outer
    end()
    now, _outer = Beat(rank, socket.gethostname(), os.getpid()), None
    with suppress(OSError):
        _open(path_of(logs, rank))
    _write()


def _open(path: Path) -> None:
    global _file
    path.unlink(missing_ok=True)
    _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def end() -> None:
    """The rank leaves."""
    global _file
    if _file is not None:
        now.ended = True
        _write()
        os.close(_file)
        _file = None


def at(step: int) -> None:
    """Step ``step`` (from 1) begins; the ones before it are done."""
    now.step, now.done = step, step - 1


def done(step: int) -> None:
    """``step`` steps are done."""
    now.done = step


def phase(name: str) -> None:
    """The rank begins ``name``; inside :func:`doing` that block's name stays."""
    now.phase = _outer or name
    now.beats += 1
    now.since = time.time()
    _write()


@contextmanager
def doing(name: str) -> Iterator[None]:
    """The rank is in ``name`` while the block runs, whatever phases are inside."""
    global _outer
    before, _outer = _outer, _outer or name
    phase(name)
    try:
        yield
    finally:
        _outer = before


def _write() -> None:
    if _file is not None:
        with suppress(OSError):
            os.pwrite(_file, json.dumps(asdict(now)).ljust(SIZE - 1).encode() + b"\n", 0)


def read(logs: Path) -> list[Beat]:
    """The records of a run, by rank; one that cannot be read is left out."""
    names = {field.name for field in fields(Beat)}
    found = []
    for path in logs.glob("heartbeat_*.json"):
        try:
            record = json.loads(path.read_text())
            found.append(Beat(**{name: value for name, value in record.items() if name in names}))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda beat: beat.rank)


def clear(logs: Path) -> None:
    """Remove the records of an earlier start."""
    for path in logs.glob("heartbeat_*.json"):
        path.unlink(missing_ok=True)


def missing(beats: list[Beat]) -> Beat | None:
    """The rank that the others wait for: of those that have not left, the one that has passed the fewest phases."""
    return min((beat for beat in beats if not beat.ended), key=lambda beat: (beat.beats, beat.rank), default=None)
