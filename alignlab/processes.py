"""Signals that ask a run to stop, and processes that must not outlive the one that started them.

Nothing heavy is imported here: these are the first lines that a launcher, an agent or a rank runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import IO, Protocol

from alignlab.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Each means: stop at the next step boundary, saved.  Clusters use USR1 and USR2 before a time limit."""
POLL_SECONDS = 0.05

_PR_SET_PDEATHSIG = 1
# Loaded here, since what runs between a fork and an exec should not load anything.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class StopFlag:
    """Set by a signal; read where it is safe to stop.  The handler does nothing else, so it may fire anywhere.

    Later signals change nothing: a save under way is finished.  One exception is the second Ctrl-C of a user whose
    process is not a rank below a launcher; it ends the process at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """the first signal that came"""

    @property
    def set(self) -> bool:
        """Whether a stop was asked for."""
        return self.number is not None

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        """Take the stop signals while the block runs (only a process's main thread can).

        A flag that was installed around this one hands over what it has got already.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        outer = getattr(before[signal.SIGTERM], "__self__", None)
        if isinstance(outer, StopFlag) and outer.set and not self.set:
            self.number = outer.number
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if isinstance(outer, StopFlag) and not outer.set:
                outer.number = self.number

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.number is None:
            self.number = number
        elif number == self.number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt

    def __call__(self) -> bool:
        return self.set


class Child(Protocol):
    """What is waited for: the part of ``subprocess.Popen`` that :func:`wait` uses."""

    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


def wait(child: Child, stop: StopFlag, watch: Callable[[], bool] = lambda: True) -> int:
    """The exit code of ``child``.  The first stop signal is passed on to it, later ones are not.

    A second signal would end torchrun's wait for the ranks, and with it a save under way.  ``watch()`` is called in
    between; False kills the child.  Whatever ends the wait early, the child does not outlive it.
    """
    passed_on = False
    try:
        while True:
            if stop.number is not None and not passed_on:
                passed_on = True
                child.send_signal(stop.number)
            try:
                return child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if not watch():
                    child.kill()
                    return child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise


def call(
    command: list[str],
    environment: Mapping[str, str],
    stdout: int | IO[bytes] | None = None,
    *,
    stderr: int | None = None,
    stop: StopFlag | None = None,
) -> int:
    """The exit code of a command in a session of its own; 75 too where a stop came before the command could take it.

    A stop signal to this process is passed on; the command does not outlive it.  From a thread, which no signal
    reaches, ``stop`` is the flag that the main thread has installed.
    """
    with nullcontext(stop) if stop is not None else StopFlag().installed() as stop:
        if stop.set:
            return Preempted.exit_code
        child = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env={**os.environ, **environment}, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        code = wait(child, stop)
        return Preempted.exit_code if stop.set and -code in STOP_SIGNALS else code


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed launcher leaves no trainer behind.

    torchrun does not do this: SIGKILL of its agent leaves workers that go on writing checkpoints.
    """
    if _libc is None:
        return
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
