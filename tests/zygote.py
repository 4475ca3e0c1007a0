"""A process that has imported everything, and forks a process for whatever it is asked to start (``forks.py`` asks).

A start of two ranks costs fifteen seconds of processor, nearly all imports.  Here it costs one fork: hundreds of runs,
and kills, become affordable.  Everything else is the real thing: the command line, the run folder and its lock, the
worker, gloo, DeepSpeed, files.  Only torchrun is stood in for (:func:`agent`); there are runs with the real one too.

Protocol: one JSON object a message on a socket, with the three standard streams of the process to be; answered by
``{"pid": ...}``.  When that process has ended, ``{"pid": ..., "code": ...}`` follows.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

COMMAND = ["-m", "alignlab"]
AGENT = ["-m", "alignlab.launching.agent"]
MESSAGE = 1 << 20
"""The most bytes a message may have."""
PRELOADED = (
    "deepspeed", "peft", "transformers.convert_slow_tokenizer", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama", "alignlab.engine.deepspeed", "alignlab.launching.sweep",
    "alignlab.testing", "alignlab.verbs.env", "alignlab.verbs.train", "alignlab.worker",
)  # fmt: skip
"""What a run imports, also late in it."""


def ours(command: list[str]) -> bool:
    """Whether this is Python with alignlab's command line or another module of alignlab's."""
    return command[:2] == [sys.executable, "-m"] and command[2].partition(".")[0] == "alignlab"


def preload() -> None:
    """Import what a run needs, also late; nothing that starts a thread, since a fork keeps only the calling one."""
    import logging

    from alignlab.cli import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in PRELOADED:
        importlib.import_module(name)
    import torch
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from alignlab.configuration import compose, groups
    from alignlab.registry import OBJECTIVES

    for name in OBJECTIVES.names():
        OBJECTIVES.get(name)
    compose.compose(["model=tiny", "data=sums", "objective=sft"], needs=())  # what Hydra builds at its first use
    groups._composed.cache_clear()
    get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"{len(threads)} threads run before the fork; set OMP_NUM_THREADS and its like to 1")
    # A collection in a child would touch, and so copy, all that it shares with this process.
    gc.collect()
    gc.freeze()


# ---------------------------------------------------------------------------------------------------------------
# Forked children
# ---------------------------------------------------------------------------------------------------------------


class Forked:
    """A child that was forked: the part of ``subprocess.Popen`` that the launcher and a sweep use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout if timeout is not None else 1e9)
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
            else:
                time.sleep(0.005)
        return self._code

    def send_signal(self, sig: int) -> None:
        if self._code is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(function: Callable[..., Any], *arguments: Any, session: bool = False) -> int:
    """The process number of a child that calls ``function`` and exits with the code it returns (None: 0)."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if session:
            os.setsid()
        _leave(function, *arguments)
    return pid


def _leave(function: Callable[..., Any], *arguments: Any) -> NoReturn:
    """Call and end this process, whatever happens, without returning into the code it was forked from."""
    code = 1
    try:
        code = function(*arguments) or 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _own_thread_pool() -> None:
    """Make torch's pool anew after a fork, while one thread runs: two that ask at once may find none (it asserts)."""
    import torch

    torch.set_num_threads(1)


def _take_streams(streams: Mapping[int, int]) -> None:
    """``streams``: what becomes of the file descriptors 0, 1, 2; Python's own are made anew, with empty buffers."""
    for number, source in streams.items():
        os.dup2(source, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False, buffering=1, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


class Subprocess:
    """Stands in for the module ``subprocess`` where alignlab starts alignlab: ``fork(command, options)`` instead."""

    def __init__(self, fork: Callable[[list[str], dict[str, Any]], Any]) -> None:
        self._fork = fork

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, command: list[str], **options: Any) -> Any:
        """A process of ours is forked, any other is started."""
        return self._fork(command, options) if ours(command) else subprocess.Popen(command, **options)


def _own_fork(command: list[str], options: dict[str, Any]) -> Forked:
    session = options.pop("start_new_session", False)
    return Forked(fork(_child, command[1:], options, session=session))


def _child(command: list[str], options: Mapping[str, Any]) -> int:
    streams = {number: options.get(name) for number, name in ((1, "stdout"), (2, "stderr"))}
    numbers = {n: s if isinstance(s, int) else s.fileno() for n, s in streams.items() if s is not None}
    if numbers.get(2) == subprocess.STDOUT:
        numbers[2] = numbers.get(1, 1)
    _take_streams(numbers)
    if before := options.get("preexec_fn"):
        before()
    if (environment := options.get("env")) is not None:
        _take_environment(environment)
    return run(command)


def _take_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


# ---------------------------------------------------------------------------------------------------------------
# What a child does
# ---------------------------------------------------------------------------------------------------------------


def run(command: list[str]) -> int:
    """What ``python COMMAND`` would do, for :func:`ours`."""
    from alignlab import processes
    from alignlab.cli import main
    from alignlab.launching import supervise

    _own_thread_pool()
    if command[:2] == AGENT:
        return agent(command[2:])
    processes.subprocess = supervise.subprocess = Subprocess(_own_fork)  # type: ignore[attr-defined]
    if command[:2] != COMMAND:
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return 0
    if "ALIGNLAB_FAULT" in os.environ:
        sys.path.insert(0, str(Path(__file__).with_name("chaos")))
        importlib.import_module("faults")  # puts itself in
    sys.argv = ["alignlab", *command[2:]]
    return main(command[2:])


def agent(arguments: list[str]) -> int:
    """What ``alignlab.launching.agent`` does with torchrun: start the ranks, pass a signal on, stop all when one fails.

    Writes ``pids.json`` into the working folder of the run's launcher, for those who want to kill.
    """
    from alignlab.errors import Preempted
    from alignlab.launching.agent import PARENT, write_report
    from alignlab.processes import STOP_SIGNALS

    logs = Path(arguments[0])
    processes = int(arguments[arguments.index("--nproc-per-node") + 1])
    module, rest = arguments[arguments.index("-m") + 1], arguments[arguments.index("-m") + 2 :]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), PARENT: str(os.getpid()),
    }  # fmt: skip
    ranks: dict[int, int] = {}
    asked: list[int] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for rank in range(processes):
        ranks[fork(_rank, rank, module, rest)] = rank
    for number in STOP_SIGNALS:
        signal.signal(number, lambda got, _: asked.append(got))
    _write_pids({"agent": os.getpid(), **{str(rank): pid for pid, rank in ranks.items()}})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    codes: dict[int, int] = {}
    sent, deadline = False, 0.0
    while ranks:
        if (asked or codes) and not sent:
            sent, deadline = True, time.monotonic() + 150
            for pid in ranks:
                os.kill(pid, asked[0] if asked else signal.SIGTERM)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = ranks.pop(pid)
            if status:
                codes[rank] = os.waitstatus_to_exitcode(status)
        elif sent and time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.01)
    if asked:
        return Preempted.exit_code
    return write_report(logs, codes) if codes else 0


def _rank(rank: int, module: str, arguments: list[str]) -> int:
    """What ``python -m MODULE`` does on a rank, imports done."""
    from alignlab.processes import STOP_SIGNALS, StopFlag, die_with_parent

    die_with_parent()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    _own_thread_pool()
    if module != "alignlab.launching.rank":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return int(importlib.import_module(module).main(*arguments) or 0)
    from alignlab import worker

    with StopFlag().installed():  # first, as in ``rank.py``: a signal must find someone who remembers it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return worker.main(*arguments)


def _write_pids(pids: dict[str, int]) -> None:
    Path("pids.json.tmp").write_text(json.dumps(pids))
    os.replace("pids.json.tmp", "pids.json")


def call(file: str, function: str, arguments: dict[str, Any], out: str) -> int:
    """One rank of ``spawn``: ``function(**arguments)`` of a test's file, and what it returned as JSON in ``out``."""
    from alignlab import dist
    from alignlab.processes import die_with_parent

    die_with_parent()
    _own_thread_pool()
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(file).stem] = module
    spec.loader.exec_module(module)
    result = getattr(module, function)(**arguments)
    Path(out, f"rank{dist.rank()}.json").write_text(json.dumps(result))
    dist.shutdown()
    return 0


# ---------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------


def _started(order: dict[str, Any], streams: list[int]) -> int:
    _take_streams(dict(enumerate(streams)))
    os.chdir(order["cwd"])
    _take_environment(order["env"])
    return call(**order["call"]) if "call" in order else run(order["command"])


def serve(channel: socket.socket) -> None:
    """Answer orders until the other side is gone; then whatever still runs is killed."""
    preload()
    channel.send(json.dumps({"pid": os.getpid()}).encode())
    running: set[int] = set()
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C ends the tests; their end ends this
    while not stopping:
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running.discard(pid)
            try:
                channel.send(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}).encode())
            except OSError:
                stopping.append(1)
        if not select.select([channel], [], [], 0.01)[0]:
            continue
        message, streams, _, _ = socket.recv_fds(channel, MESSAGE, 3)
        if not message:
            break
        order = json.loads(message)
        pid = fork(_in_child, channel, order, streams, session=order.get("session", False))
        for number in streams:
            os.close(number)
        running.add(pid)
        channel.send(json.dumps({"pid": pid}).encode())
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _in_child(channel: socket.socket, order: dict[str, Any], streams: list[int]) -> int:
    channel.close()
    return _started(order, streams)


if __name__ == "__main__":
    sys.modules["zygote"] = sys.modules["__main__"]
    serve(socket.socket(fileno=int(sys.argv[1])))
