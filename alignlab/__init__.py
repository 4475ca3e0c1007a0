"""alignlab: alignment training for language models, every objective on one exact loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def run(verb: str, file: str | Path | None = None, **settings: Any) -> int:
    """``alignlab <verb> [file] key=value ...`` from Python; returns the exit code, errors are raised.

    ``settings`` are nested (``optim={"learning_rate": 1e-5}``) or dotted (``**{"optim.learning_rate": 1e-5}``).
    """
    from alignlab.cli import call

    return call(verb, None if file is None else str(file), settings)
