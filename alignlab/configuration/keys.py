"""``keys.json`` of a run folder: for each key its value, who set it, and whether the run read it.

The launcher writes it beside ``run.yaml``; the first worker adds what it read, after the first step and at the end.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from alignlab.durable import write_atomic

FILE = "keys.json"

BY_EVENT = (
    "overwrite", "resume", "resume_allow", "train.nonfinite", "train.save_total_limit", "train.save_steps",
    "debug.name", "run.name", "plugins",
)  # fmt: skip
"""Keys that are read before (plug-ins) or when something happens (a used folder, a number that is not finite): a
run may do without reading them, so they are never warned of."""

Record = dict[str, dict[str, Any]]


def record(
    values: Mapping[str, Any],
    provenance: Mapping[str, str],
    stated: Collection[str],
    reads: Collection[str],
    before: Record | None = None,
) -> Record:
    """``{key: {value, set_by, stated, read}}``; ``stated``: the user or a recipe set it.

    What an earlier start of the run (``before``: sbatch's submission, a run that is resumed) read stays read.
    """
    earlier = {key: entry["value"] for key, entry in (before or {}).items() if entry["read"]}
    return {
        key: {
            "value": value,
            "set_by": provenance.get(key, "default"),
            "stated": key in stated,
            "read": key in reads or (key in earlier and earlier[key] == value),
        }
        for key, value in values.items()
    }


def write(folder: Path, found: Record) -> None:
    """Write the record, one key a line."""
    lines = [f" {json.dumps(key)}: {json.dumps(entry, ensure_ascii=False)}" for key, entry in found.items()]
    write_atomic(folder / FILE, "{\n" + ",\n".join(lines) + "\n}\n")


def add_reads(folder: Path, reads: Collection[str]) -> Record:
    """Note that ``reads`` were read, too; the record as it stands then (empty where the folder has none)."""
    found = recorded(folder / "run.yaml")
    for key in found:
        found[key]["read"] = found[key]["read"] or key in reads
    if found:
        write(folder, found)
    return found


def recorded(run_yaml: Path) -> Record:
    """The record beside a run's own file; empty for any other file."""
    if run_yaml.name != "run.yaml":
        return {}
    try:
        found = json.loads((run_yaml.parent / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    complete = isinstance(found, dict) and all(
        isinstance(entry, dict) and {"value", "set_by", "stated", "read"} <= set(entry) for entry in found.values()
    )
    return found if complete else {}


def unread(found: Record) -> dict[str, str]:
    """``{key: who set it}`` of the keys that were set by the user and that nothing has read."""
    return {
        key: entry["set_by"]
        for key, entry in found.items()
        if entry["stated"] and not entry["read"] and key not in BY_EVENT
    }


def warning(found: Record) -> str | None:
    """The one line that names all of them."""
    idle = unread(found)
    if not idle:
        return None
    named = ", ".join(f"{key} ({who})" for key, who in idle.items())
    return f"set but not read, so without effect on this run: {named}"
