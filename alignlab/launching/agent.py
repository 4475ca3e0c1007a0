"""torchrun, with what it lacks: ``python -m alignlab.launching.agent LOGS TORCHRUN_ARGUMENTS``.

- Its parent's death ends it, and its death ends the ranks.
- Only the first signal counts: torchrun's handler raises, and a second one would end the wait for ranks that save.
- How its ranks ended stands in ``LOGS/agent_<host>.json``; it exits with 75 where a stop signal ended it or them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from alignlab.errors import Preempted
from alignlab.imports import importing
from alignlab.processes import STOP_SIGNALS, die_with_parent

PARENT = "ALIGNLAB_AGENT"
"""The agent's process number, in the environment of its ranks."""


def write_report(logs: Path, codes: Mapping[int, int]) -> int:
    """Leave the exit codes of failed ranks (by rank; a signal is negative); the exit code that they give the agent."""
    path = logs / f"agent_{socket.gethostname()}.json"
    path.write_text(json.dumps({str(rank): code for rank, code in codes.items()}))
    stopped = any(-code in STOP_SIGNALS or code == Preempted.exit_code for code in codes.values())
    return Preempted.exit_code if stopped else 1


def read_reports(logs: Path) -> dict[int, int]:
    """Exit codes of the ranks that failed, of all nodes."""
    found: dict[int, int] = {}
    for path in logs.glob("agent_*.json"):
        try:
            found |= {int(rank): int(code) for rank, code in json.loads(path.read_text()).items()}
        except (OSError, ValueError, AttributeError):
            continue
    return found


def clear_reports(logs: Path) -> None:
    """Remove the reports of an earlier start."""
    for path in logs.glob("agent_*.json"):
        path.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """Run torchrun in this process; its exit code."""
    die_with_parent()
    logs, rest = Path(arguments[0]), arguments[1:]
    os.environ[PARENT] = str(os.getpid())
    if "store_type=file" in rest:
        # All ranks are on this node: they meet on the loopback (dist.init), not at a server of torchrun's, which would
        # listen on every address.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with importing():
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException, api
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    raising = api._terminate_process_handler

    def once(signum: int, frame: FrameType | None) -> None:
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raising(signum, frame)

    api._terminate_process_handler = once
    try:
        run.main(rest)
    except SignalException as error:
        print(error, file=sys.stderr)
        return Preempted.exit_code
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return write_report(logs, {rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
