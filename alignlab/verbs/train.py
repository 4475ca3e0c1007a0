"""``alignlab train``: compose, own the run folder, start the workers, return their outcome."""

from __future__ import annotations

from alignlab import liveness
from alignlab.configuration.watch import watched
from alignlab.launching.launch import launch
from alignlab.request import Request


def run(request: Request) -> int:
    """Train; the exit code is that of interface.md 3, as the workers left it in ``status.json``."""
    liveness.gate(request)
    request.config = watched(request.config, request.reads)
    return launch(request)
