"""The rows that a lint has nothing against, as a file; the others, each with its reasons, in a second one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from alignlab.config import DataConfig
from alignlab.data.rows import RowError
from alignlab.data.sources import Needs, rows_of, sources_of
from alignlab.durable import sync
from alignlab.errors import ConfigError, DataError, StorageError
from alignlab.lint.findings import Place
from alignlab.types import Unit

_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""What some readers take for a line's end; in JSON they stand inside strings only."""


def second_file(path: Path) -> Path:
    """Where the rows that are left out go: ``cleaned.jsonl`` has ``cleaned.left_out.jsonl`` beside it."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.left_out.jsonl")


def check_target(path: Path, data: DataConfig, *, overwrite: bool) -> None:
    """Refuse, before any work, what could not be written: over a file that is there, or rows of several sources."""
    if path.suffix != ".jsonl":
        raise ConfigError(f"--write {path}: the cleaned rows are JSON lines; name it ....jsonl")
    if len(sources_of(data, held_out=False)) > 1:
        raise ConfigError("--write: a mixture's sources differ in format and weight; clean each by itself")
    if not path.parent.is_dir():
        raise ConfigError(f"--write {path}: no such folder: {path.parent}")
    read = Path(data.path or "").resolve()
    for file in (path, second_file(path)):
        if file.resolve() == read or (read.is_dir() and file.resolve().is_relative_to(read) and data.path):
            raise ConfigError(f"--write: {file} is, or lies in, what is read ({data.path})")
        if file.exists() and not overwrite:
            raise ConfigError(f"--write: {file} exists; overwrite=true replaces it")


def write(
    path: Path, data: DataConfig, leaving: Mapping[Place, list[dict[str, Any]]], rows: int, needs: Needs | None = None
) -> tuple[int, int]:
    """Write the rows as they stand in their file, without those in ``leaving``; (rows kept, rows left out).

    Both files appear whole or not at all, the cleaned one last.  ``rows``: how many the lint read; a file that changed
    since is a :class:`StorageError`.
    """
    (source,) = sources_of(data, held_out=False)
    parts = [file.with_name(f".{file.name}.{os.getpid()}") for file in (path, second_file(path))]
    kept = left_out = 0

    def unreadable(error: RowError) -> None:
        nonlocal left_out
        left_out += 1
        entry = {"finding": "malformed", "reason": error.reason, "detail": error.detail}
        _line(second, {"file": error.file, "line": error.line, "reasons": [entry]})

    try:
        with parts[0].open("x", encoding="utf-8") as first, parts[1].open("x", encoding="utf-8") as second:
            for row in rows_of(source, data, needs or Needs(Unit.SEQUENCE), held_out=False, on_error=unreadable):
                why = leaving.get(Place(row.file, row.line))
                if why is None:
                    kept += 1
                    for original in row.originals:
                        _line(first, original)
                    continue
                left_out += 1
                reasons = [{k: v for k, v in entry.items() if k not in ("file", "line")} for entry in why]
                found = row.originals[0] if len(row.originals) == 1 else list(row.originals)
                _line(second, {"file": row.file, "line": row.line, "reasons": reasons, "row": found})
        if kept + left_out != rows:
            raise StorageError(f"{source.path}: changed while it was read ({rows:,} rows, then {kept + left_out:,})")
        for part in parts:
            sync(part)
        parts[1].replace(second_file(path))
        parts[0].replace(path)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"--write {path}: {error.strerror or error}") from None
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()
    return kept, left_out


def _line(file: TextIO, value: object) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # a parquet file's dates, say
        raise DataError(f"--write: a row holds what JSON lines cannot ({error})") from None
    file.write(text.translate(_LINE_ENDS) + "\n")
