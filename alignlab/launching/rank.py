"""The start of one rank: ``python -m alignlab.launching.rank RUN_FOLDER``.

Signals are taken and the bond to the agent is tied before anything heavy is imported: imports take seconds, and a
signal in that time would kill the rank, a dead agent would leave it behind.
"""

from __future__ import annotations

import os
import sys

from alignlab.imports import importing
from alignlab.launching.agent import PARENT
from alignlab.processes import StopFlag, die_with_parent


def main(run_folder: str) -> int:
    """The worker; its exit code."""
    die_with_parent()
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        return 1  # the agent died while this process started
    with StopFlag().installed():
        with importing():
            from alignlab import worker
        return worker.main(run_folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
