"""The ranks of one node: started through torchrun, watched while they run, and what their end means.

A rank that fails writes ``status.json`` and leaves; the others lose it in their next collective and leave too.  What
cannot leave by itself is ended from here: a hung or stopped rank, one that waits for a dead one where no collective
notices, one that hangs on its way out.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from alignlab import heartbeat, pids
from alignlab.errors import BusyError, HangError, Preempted
from alignlab.launching import agent
from alignlab.processes import STOP_SIGNALS, Child, StopFlag, die_with_parent, wait
from alignlab.runfolder import RunFolder

SHUTDOWN_SECONDS = 150
"""How long torchrun lets ranks save after a signal (its own default of 30 s kills long saves)."""
GRACE_SECONDS = 10.0
"""How long ranks may take to leave when the run's outcome stands, or when one of them is dead."""
LOOK_SECONDS = 0.5


def torchrun(
    folder: RunFolder, processes: int, rendezvous: list[str] | None = None, module: str = "alignlab.launching.rank"
) -> list[str]:
    """The command that starts the workers of this node; alone on this node it listens on the loopback only."""
    # --standalone would open a server on every address of the machine; a private temporary file does as well.
    alone = [
        "--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-id", uuid.uuid4().hex,
        "--local-addr", "127.0.0.1",
    ]  # fmt: skip
    return [
        sys.executable, "-m", "alignlab.launching.agent", str(folder.logs),
        *(alone if rendezvous is None else rendezvous),
        "--nproc-per-node", str(processes), "--max-restarts", "0", "--shutdown-timeout", str(SHUTDOWN_SECONDS),
        "--signals-to-handle", ",".join(s.name for s in STOP_SIGNALS), "-m", module, str(folder.path),
    ]  # fmt: skip


def supervise(folder: RunFolder, command: list[str], json_wanted: bool | Path = False) -> int:
    """Run torchrun as a child, pass a stop signal on, end ranks that cannot leave; how it ended, as an exit code.

    The run's own code is in ``status.json``.  Where that says nothing: 75 means that a signal ended the ranks before
    one of them could speak, 5 that they had to be killed, anything else is torchrun's.
    """
    folder.logs.mkdir(parents=True, exist_ok=True)
    with StopFlag().installed() as stop:
        if stop.set:
            return Preempted.exit_code  # before anything was started
        watch = Watch(folder)
        code = wait(start(folder, command, json_wanted), stop, watch)
    if watch.disowned:
        raise BusyError(f"{folder}: taken over by {folder.owner_text()}; this start has ended its ranks")
    if watch.ended_it:
        return HangError.exit_code
    return Preempted.exit_code if stop.set or -code in STOP_SIGNALS else code


def start(folder: RunFolder, command: list[str], json_wanted: bool | Path) -> Child:
    """The agent as a child of this process, in a session of its own: a Ctrl-C must arrive once, through us."""
    with (folder.logs / "torchrun.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdout=2 if json_wanted is True else None,  # --json keeps standard output for itself
            stderr=log,  # torchrun's own report; what a worker has to say is in status.json
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


class Watch:
    """Called again and again while ranks run; False when they have to be killed."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._first = folder.status().get("time")
        self._next = 0.0
        self._since: float | None = None
        self.ended_it = False
        self.disowned = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return True
        self._next = now + LOOK_SECONDS
        self.disowned = self._folder.disowned
        if self.disowned:
            return False
        if not self._over():
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since > GRACE_SECONDS:
            self.ended_it = True
            return False
        return True

    def _over(self) -> bool:
        """Whether the run has come to its end, so that ranks which still run do so in vain."""
        status = self._folder.status()
        if status.get("time") != self._first and status.get("state") not in (None, "running"):
            return True
        return any(_died(beat) for beat in heartbeat.read(self._folder.logs))


def _died(beat: heartbeat.Beat) -> bool:
    """Whether a rank of this node is gone without having left."""
    if beat.ended or beat.host != socket.gethostname():
        return False
    return pids.gone(beat.pid)


def forget(folder: RunFolder) -> None:
    """Remove what the ranks and agents of an earlier start left to be read here."""
    heartbeat.clear(folder.logs)
    agent.clear_reports(folder.logs)


def lost(folder: RunFolder, code: int) -> tuple[str, dict[str, Any] | None]:
    """Which rank was lost, where and how: one line, and the same as fields for ``status.json``.

    ``code`` is what :func:`supervise` returned.
    """
    logs = f"see {folder.logs} and {folder.log}"
    beats = heartbeat.read(folder.logs)
    reports = agent.read_reports(folder.logs)
    dead = {rank: number for rank, number in reports.items() if rank not in {b.rank for b in beats if b.ended}}
    if code < 0 and not dead:
        name = signal.Signals(-code).name
        where = f"; the ranks were at {beats[0].place}" if beats else ""
        return f"the workers ended without a word: their agent was killed by {name}{where}; {logs}", None
    named = next((beat for beat in beats if beat.rank in dead), None) or heartbeat.missing(beats)
    if named is None:
        return f"the workers ended without a word (exit code {code}): a rank was killed or crashed; {logs}", None
    how = _how(dead.get(named.rank))
    found = {"rank": named.rank, "host": named.host, "step": named.step, "phase": named.phase, "how": how}
    return f"rank {named.rank} {how} at {named.place} (process {named.pid} on {named.host}); {logs}", found


def _how(code: int | None) -> str:
    if code is None:
        return "hung"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
