"""Start alignlab, or a function of a test, in a process of its own, without paying for its imports (``zygote.py``).

    started = forks.start("train", "model=tiny", ..., cwd=folder)      # what ``python -m alignlab train ...`` starts
    out, err = started.communicate(timeout=100); started.returncode

One zygote serves all tests of a pytest process; it is made when first needed, ends with that process, and kills what
then still runs.  Tests whose subject is the start of a process itself launch Python with ``subprocess``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from zygote import COMMAND, MESSAGE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "JE_ARROW_MALLOC_CONF": "background_thread:false", "PYTHONPATH": str(ROOT),
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}  # fmt: skip
"""One thread a process: what forks must not hold others (pyarrow's allocator starts one, unless told not to), and a GPU
is not to be touched before a fork."""


class Started:
    """A process that the zygote forked: the part of ``subprocess.Popen`` that tests and alignlab's launchers use."""

    def __init__(self, zygote: Zygote, pid: int, out: IO[bytes] | None = None, err: IO[bytes] | None = None) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote, self._out, self._err = zygote, out, err

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        if self.returncode is None:
            self.returncode = self._zygote.code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; ``subprocess.TimeoutExpired`` when it takes longer."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork of the zygote", timeout or 0.0)
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to standard output and standard error, once it has ended."""
        self.wait(timeout)
        return _text(self._out), _text(self._err)

    def send_signal(self, number: int) -> None:
        """To a process that has ended, none."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _unnamed() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _text(stream: IO[bytes] | None) -> str:
    if stream is None:
        return ""
    stream.seek(0)
    return stream.read().decode()


class Zygote:
    """The zygote of this process, seen from here; started at the first order."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()

    def start(
        self, *words: str, cwd: str | Path, env: Mapping[str, str] | None = None, stdin: int | IO[bytes] | None = None,
        output: IO[bytes] | None = None, session: bool = False,
    ) -> Started:  # fmt: skip
        """``python -m alignlab WORDS`` in ``cwd``; ``env`` is put over this process's environment.

        Both streams go to ``output``, or else are kept for :meth:`Started.communicate`.
        """
        out, err = (output, output) if output else (_unnamed(), _unnamed())
        order = {"command": [*COMMAND, *words], "session": session}
        return self.fork(order, cwd, {**os.environ, **(env or {})}, stdin=stdin, out=out, err=err)

    def fork(
        self, order: dict[str, Any], cwd: str | Path, env: Mapping[str, str], *,
        stdin: int | IO[bytes] | None = None, out: IO[bytes], err: IO[bytes],
    ) -> Started:  # fmt: skip
        """Send an order (see ``zygote.py``); the process, whose environment is ``env`` and :data:`ENVIRONMENT`."""
        environment = {**env, **ENVIRONMENT}
        message = json.dumps({**order, "cwd": str(cwd), "env": environment}).encode()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            source = nothing if stdin is None else stdin if isinstance(stdin, int) else stdin.fileno()
            with self._lock:
                self._ready()
                socket.send_fds(self._channel, [message], [source, out.fileno(), err.fileno()])
                while "code" in (answer := self._receive()):
                    self._codes[answer["pid"]] = answer["code"]
                self._codes.pop(answer["pid"], None)  # of an earlier process with this number
        finally:
            os.close(nothing)
        return Started(self, answer["pid"], out, err)

    def code(self, pid: int) -> int | None:
        """The exit code of a process that has ended."""
        with self._lock:
            while pid not in self._codes:
                try:
                    answer = self._receive(socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return None
                self._codes[answer["pid"]] = answer["code"]
            return self._codes[pid]

    def close(self) -> None:
        """End the zygote and what it still runs."""
        if self._process is not None:
            self._channel.close()
            self._process.wait(30)
            self._process = None

    def _ready(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._channel, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE)
        self._said = _unnamed()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "zygote.py"), str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
            )  # fmt: skip
        self._receive()

    def _receive(self, flags: int = 0) -> dict[str, Any]:
        message = self._channel.recv(MESSAGE, flags)
        if not message:
            raise RuntimeError(f"the zygote ended: {_text(self._said)[-2000:]}")
        return dict(json.loads(message))


zygote = Zygote()
"""All tests of this process share it; closing the pytest process ends it."""
start = zygote.start


def from_zygote(command: list[str], options: dict[str, Any]) -> Any:
    """What :class:`zygote.Subprocess` calls in a pytest process."""
    out, err = (_descriptor(options.get(name), number) for name, number in (("stdout", 1), ("stderr", 2)))
    if options.get("stderr") == subprocess.STDOUT:
        err = out
    order = {"command": command[1:], "session": options.get("start_new_session", False)}
    with open(os.dup(out), "wb") as first, open(os.dup(err), "wb") as second:
        return zygote.fork(order, os.getcwd(), options.get("env") or os.environ, out=first, err=second)


def _descriptor(stream: int | IO[bytes] | None, default: int) -> int:
    return default if stream is None else stream if isinstance(stream, int) else stream.fileno()
