"""``alignlab ls [FOLDER]``: the runs in a folder and how they stand; ``alignlab ls recipes``: the recipes here."""

from __future__ import annotations

from pathlib import Path

from alignlab.errors import ConfigError
from alignlab.recipes import bands, shelf
from alignlab.recipes.reading import read
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder

RECIPES = "recipes"
HINT = "recipes, their scales and what they cost: alignlab ls recipes"


def run(request: Request) -> int:
    """One line a run: state, step, attempt, name."""
    if len(request.words) > 1:
        raise ConfigError("ls takes one folder")
    if request.words == [RECIPES]:
        return _recipes(request)
    root = Path(request.words[0] if request.words else "runs")
    if not root.is_dir():
        raise ConfigError(f"ls: no such folder: {root}" + ("" if request.words else f" ({HINT})"))
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
    if not request.words:
        print(HINT)
    emit(request, {"folder": str(root), "runs": found})
    return 0


def _recipes(request: Request) -> int:
    """One line a recipe and scale: time, memory, hardware, whether bands were measured, title."""
    found = []
    for name in shelf.names():
        folder = shelf.find(name)
        expected = bands.read(folder)
        for scale in shelf.scales(folder):
            made = read(folder, scale)
            seeds = len(expected.get(scale, {}).get("seeds", ()))
            found.append({
                "recipe": name, "scale": scale, "seconds": made.seconds, "memory_gib": made.memory_gib,
                "hardware": made.hardware, "seeds": seeds, "title": made.title,
            })  # fmt: skip
            memory = "memory ?" if made.memory_gib is None else f"{made.memory_gib:g} GiB"
            measured = f"bands of {seeds} seeds" if seeds else "no band yet"
            print(f"{name:<14} {scale:<6} {_time(made.seconds):<9} {memory:<9} {measured:<17} {made.hardware}")
            print(f"{'':<14} {made.title}")
    if not found:
        print("no recipes here")
    emit(request, {"recipes": found})
    return 0


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "time ?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
