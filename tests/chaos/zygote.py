"""A process that has imported everything, and forks a launcher for every run it is asked for.

A start of two ranks costs ten seconds, nearly all imports.  Here it costs one fork: hundreds of kills become
affordable.  Everything else is the real thing: the command line, the run folder and its lock, the worker, gloo,
DeepSpeed, files.  Only torchrun is stood in for (:func:`agent`); runs with the real one are in the shards too.

Protocol: one JSON object a line on standard input (``argv``, ``env``, ``cwd``, ``log``), answered by one with the
launcher's ``pid``.  When that process ends, its code stands in ``<log>.exit``.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def preload() -> None:
    """Import what a run needs; nothing that starts a thread, since a fork keeps only the calling one."""
    import logging

    import torch
    import transformers
    import transformers.models.llama.modeling_llama

    import alignlab.engine.deepspeed
    import alignlab.sweep
    import alignlab.testing
    import alignlab.verbs.env
    import alignlab.verbs.train
    import alignlab.worker  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"{len(threads)} threads run before the fork; set OMP_NUM_THREADS and its like to 1")


def agent(folder: str, processes: int) -> int:
    """What ``alignlab.agent`` does for us with torchrun: start the ranks, pass a signal on, stop all when one fails.

    Writes ``pids.json`` into the working folder of the run's launcher, for those who want to kill.
    """
    from alignlab.agent import write_report
    from alignlab.errors import Preempted
    from alignlab.processes import STOP_SIGNALS, die_with_parent
    from alignlab.runfolder import RunFolder

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: dict[int, int] = {}
    asked: list[int] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda got, _: asked.append(got))
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            die_with_parent()
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": str(port),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            }  # fmt: skip
            _leave(_worker, folder)
        ranks[pid] = rank
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
    return write_report(RunFolder(folder).logs, codes) if codes else 0


def _own_thread_pool() -> None:
    """Make torch's pool anew after a fork, while one thread runs: two that ask at once may find none (it asserts)."""
    import torch

    torch.set_num_threads(1)


def _worker(folder: str) -> int:
    """What ``alignlab.rank`` does, imports done."""
    _own_thread_pool()
    from alignlab import worker
    from alignlab.processes import STOP_SIGNALS, StopFlag

    with StopFlag().installed():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return worker.main(folder)


class Forked:
    """A child that was forked: the part of ``subprocess.Popen`` that the launcher uses."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout if timeout is not None else 1e9)
        while self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired("the agent", timeout or 0.0)
            else:
                time.sleep(0.005)
        return self._code

    def send_signal(self, sig: int) -> None:
        if self._code is None:
            os.kill(self._pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _start(folder: Any, command: list[str], json_wanted: bool | Path) -> Forked:
    """In the place of ``supervise.start``: an agent forked from this process instead of one with torchrun."""
    from alignlab.processes import STOP_SIGNALS, die_with_parent

    processes = int(command[command.index("--nproc-per-node") + 1])
    pid = os.fork()
    if pid == 0:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        die_with_parent()
        _leave(agent, str(folder.path), processes)
    return Forked(pid)


def _write_pids(pids: dict[str, int]) -> None:
    Path("pids.json.tmp").write_text(json.dumps(pids))
    os.replace("pids.json.tmp", "pids.json")


def _leave(function: Any, *arguments: Any) -> None:
    """Call and end this process, whatever happens, without returning into the code it was forked from."""
    code = 70
    try:
        code = function(*arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _launcher(order: dict[str, Any]) -> int:
    import faults

    from alignlab import supervise
    from alignlab.cli import main

    _own_thread_pool()
    os.chdir(order["cwd"])
    os.environ |= order["env"]
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(log, number)
    # The streams are the zygote's: made anew, so that nothing buffered there is printed twice.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    supervise.start = _start
    faults.install()
    return main(order["argv"])


def serve() -> None:
    """Answer orders until standard input ends; then whatever still runs is killed."""
    preload()
    print(json.dumps({"pid": os.getpid()}), flush=True)
    running: dict[int, str] = {}
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    while not stopping:
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            log = running.pop(pid)
            Path(log + ".exit.tmp").write_text(str(os.waitstatus_to_exitcode(status)))
            os.replace(log + ".exit.tmp", log + ".exit")
        if not select.select([sys.stdin.buffer], [], [], 0.02)[0]:
            continue
        line = sys.stdin.buffer.raw.readline()  # type: ignore[attr-defined]
        if not line:
            break
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            _leave(_launcher, order)
        running[pid] = order["log"]
        print(json.dumps({"pid": pid}), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve()
