"""``alignlab ls [FOLDER]``: the runs in a folder and how they stand."""

from __future__ import annotations

from pathlib import Path

from alignlab.cli import Request, emit
from alignlab.errors import ConfigError
from alignlab.runfolder import RunFolder


def run(request: Request) -> int:
    """One line a run: state, step, attempt, name."""
    if len(request.words) > 1:
        raise ConfigError("ls takes one folder")
    root = Path(request.words[0] if request.words else "runs")
    if not root.is_dir():
        raise ConfigError(f"ls: no such folder: {root}")
    found = []
    for path in sorted(root.iterdir()):
        folder = RunFolder(path)
        if folder.exists:
            status = folder.status()
            found.append({"run": folder.name, "path": str(path), **status})
            state, step, attempt = status.get("state", "?"), status.get("step", "-"), status.get("attempt", "-")
            print(f"{state:<10} step {step!s:<7} attempt {attempt!s:<3} {folder.name}")
    if not found:
        print(f"{root}: no runs")
    emit(request, {"folder": str(root), "runs": found})
    return 0
