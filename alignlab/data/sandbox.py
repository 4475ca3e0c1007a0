"""Chat templates come with models, so they are foreign programs: they run in a process of their own, bounded.

Jinja's sandbox keeps a template from Python's internals, but not from time and memory: a few characters write
gigabytes.  Bounds inside this process would have to foresee every operator and filter, and no thread can stop one that
is under way.  So one helper process (:mod:`alignlab.data.render_child`) renders for this one: the kernel bounds its
processor time (2 s a rendering) and memory (512 MB), it can open no file and no socket, and its environment is empty.

An exchange over a pipe costs more than most renderings, so :func:`foresee` asks for many at once, and what was
rendered lately (the prompt of a pair, the probes of a template) is answered from memory.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignlab.data import render_child
from alignlab.errors import DataError

WALL_SECONDS = 30.0
"""How long one answer may take by the clock: a process that the machine does not let run is no attack, but no use."""
REMEMBERED = 2**24
"""Characters of requests and answers that are kept."""
LONGEST = 2**30
"""Bytes of an answer that are believed; the helper itself stops far below."""


class Refused(Exception):
    """The template raised an error of its own about one conversation (roles that do not alternate, say)."""

    reason = "template_refused"
    """What the row is counted under."""


class NeedsOtherTypes(Exception):
    """The template failed with a TypeError, as templates do that want a call's arguments as JSON text."""


def render(template: str, values: Mapping[str, Any], name: str = "of the model") -> str:
    """What ``template`` writes for ``values`` (plain JSON values; anything else appears as ``<type>``).

    ``name`` is for the error.  Raises :class:`Refused` where the template says no, :class:`NeedsOtherTypes` at a
    TypeError in it, and :class:`DataError` where it fails or exceeds its bounds.
    """
    request = _request(values)
    kind, text = _helper.ask(template, [request])[0]
    if kind == "text":
        return text
    if kind == "refused":
        raise Refused(text)
    line = " ".join(text.split())[:300]
    if kind == "type":
        raise NeedsOtherTypes(f"the chat template {name} fails: {line}")
    verb = "is stopped: it " if kind == "limit" else "fails: "
    raise DataError(f"the chat template {name} {verb}{line}")


def foresee(template: str, values: Iterable[Mapping[str, Any]]) -> None:
    """Render ``values`` in one exchange, for :func:`render` to find; what fails is said there."""
    _helper.ask(template, [_request(one) for one in values])


def _request(values: Mapping[str, Any]) -> str:
    return json.dumps(values, default=lambda value: f"<{type(value).__name__}>")


class _Helper:
    """The helper process: started when first needed, again after one that was ended, and anew in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()
        self._memory: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()
        self._held = 0
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, template: str, requests: list[str]) -> list[tuple[str, str]]:
        """(kind, text) as :func:`alignlab.data.render_child.answer` gives it; ``limit`` where the process was ended."""
        digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            found = {one: self._memory[digest, one] for one in requests if (digest, one) in self._memory}
            missing = [one for one in dict.fromkeys(requests) if one not in found]
            if missing:
                found |= zip(missing, self._told(template, digest, missing), strict=True)
                for one in missing:
                    self._remember((digest, one), found[one])
            return [found[one] for one in requests]

    def _remember(self, key: tuple[str, str], told: tuple[str, str]) -> None:
        self._memory[key] = told
        self._held += len(key[1]) + len(told[1])
        while self._held > REMEMBERED:
            (_, request), (_, text) = self._memory.popitem(last=False)
            self._held -= len(request) + len(text)

    def _told(self, template: str, digest: str, requests: list[str]) -> list[tuple[str, str]]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        source = "" if digest in self._known else f'"source": {json.dumps(template)}, '
        try:
            text = self._exchange(f'{{"template": "{digest}", {source}"values": [{", ".join(requests)}]}}'.encode())
            told = [(str(kind), str(said)) for kind, said in json.loads(text)]
        except _Ended as ended:
            return [("limit", str(ended))] * len(requests)
        except BaseException:
            self._stop()  # half an exchange is in the pipes: the next answer would be this one's
            raise
        if any(kind == "text" for kind, _ in told):
            self._known.add(digest)
        return told

    def _start(self) -> None:
        import jinja2
        import markupsafe

        folders = {str(Path(module.__file__ or "").parents[1]) for module in (jinja2, markupsafe)}
        self._known = set()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", render_child.__file__, *sorted(folders)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/",
                start_new_session=True,  # a Ctrl-C on the terminal is for us
            )  # fmt: skip
        except OSError as error:
            raise DataError(f"the process that renders chat templates cannot be started ({error.strerror})") from None

    def _exchange(self, request: bytes) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(struct.pack(">Q", len(request)) + request)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        deadline = time.monotonic() + WALL_SECONDS
        (size,) = struct.unpack(">Q", self._read(8, deadline))
        if size > LONGEST:
            raise self._ended("writes more than can be read")
        return self._read(size, deadline)

    def _read(self, count: int, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        handle, parts = self._process.stdout.fileno(), bytearray()
        while len(parts) < count:
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._ended(f"has not answered for {WALL_SECONDS:.0f} s")
            block = os.read(handle, count - len(parts))
            if not block:
                raise self._ended()
            parts += block
        return bytes(parts)

    def _ended(self, why: str | None = None) -> _Ended:
        process = self._process
        assert process is not None
        if why is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            took = process.returncode == -signal.SIGPROF
            why = f"takes more than {render_child.CPU_SECONDS:.0f} s" if took else "ends the process that renders it"
        self._stop()
        return _Ended(why)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _forget(self) -> None:
        """In a forked child: the pipes belong to the parent."""
        self._lock = threading.Lock()
        self._process = None


class _Ended(Exception):
    """The helper process is gone; the text says why, as what the template does."""


_helper = _Helper()
atexit.register(_helper._stop)
