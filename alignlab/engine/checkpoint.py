"""Checkpoints that are whole or not there: staged, hashed, renamed; the newest valid one wins, no ``latest`` file.

A checkpoint is the folder ``checkpoint-<step>`` with a ``MANIFEST.json`` that lists every file's size and SHA-256.
It is written as ``.tmp-checkpoint-<step>`` and renamed when all ranks have written, synced and agreed, so a kill at
any moment leaves either the old checkpoints or the old ones and the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab import dist
from alignlab.errors import StorageError

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_STAGING = ".tmp-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint whose manifest could be read; ``meta`` is what :func:`publish` was given."""

    path: Path
    step: int
    world_size: int
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Found:
    """The newest valid checkpoint, if any, and one line for each newer one that is damaged."""

    checkpoint: Checkpoint | None
    damaged: list[str]


def publish(root: Path, step: int, write: Callable[[Path], Any], meta: dict[str, Any] | None = None) -> Checkpoint:
    """Write the checkpoint of ``step`` below ``root``, all ranks together.

    ``write(folder)`` writes this rank's files (``engine.save``) and calls no collective: it may fail on one rank only,
    and the others would wait for it there.  ``meta`` holds
    plain JSON values: the fingerprint of the run, the state of the loop.  A rank that fails makes every rank raise a
    :class:`StorageError` that names it, and nothing is published.  A checkpoint of the same step is replaced.
    """
    final, staging = root / f"checkpoint-{step}", root / f"{_STAGING}checkpoint-{step}"
    main = dist.is_main()

    def prepare() -> None:
        if main:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()

    def seal() -> None:
        if main:
            files = {name: entry for part in dist_parts for name, entry in part.items()}
            manifest = {"step": step, "world_size": dist.world_size(), "meta": meta or {}, "files": files}
            path = staging / MANIFEST
            path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            _sync(path)
            for folder in [f for f in staging.rglob("*") if f.is_dir()] + [staging]:
                _sync(folder)
            if final.exists():
                # Renamed away and not removed in place: half a folder must never stand under the final name.
                old = root / f"{_STAGING}old-{step}"
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            staging.rename(final)
            _sync(root)
            shutil.rmtree(root / f"{_STAGING}old-{step}", ignore_errors=True)

    try:
        _together(prepare, f"cannot make {staging}")
        _together(lambda: write(staging), f"cannot write checkpoint {step} below {root}")
        mine: dict[str, dict[str, Any]] = {}
        _together(lambda: mine.update(_seal_files(staging)), f"cannot sync checkpoint {step} below {root}")
        dist_parts = dist.all_gather_object(mine)
        _together(seal, f"cannot publish {final}")
    except BaseException:
        if main:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return read(final)


def _together(action: Callable[[], Any], what: str) -> None:
    """Run ``action`` on every rank; an error on any of them is raised on all of them."""
    error: BaseException | None = None
    try:
        action()
    except Exception as caught:  # whatever it is, the other ranks are waiting and must hear of it
        line = (str(caught).strip() or type(caught).__name__).splitlines()[0]
        error = StorageError(f"{what}: {line}")
        error.__cause__ = caught
    dist.raise_together(error)


def _seal_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Sync and hash this rank's share of the files: every ``world_size``-th of the sorted list."""
    umask = os.umask(0)
    os.umask(umask)
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file())[dist.rank() :: dist.world_size()]:
        path.chmod(0o666 & ~umask)  # safetensors writes 0600
        _sync(path)
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def read(path: Path) -> Checkpoint:
    """The checkpoint at ``path`` by its manifest alone; :class:`StorageError` where that is missing or broken."""
    name = _NAME.fullmatch(path.name)
    if not name:
        raise StorageError(f"{path}: not a checkpoint; one is called checkpoint-<step>")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {str(k): {"size": int(v["size"]), "sha256": str(v["sha256"])} for k, v in manifest["files"].items()}
        found = Checkpoint(path, int(manifest["step"]), int(manifest["world_size"]), dict(manifest["meta"]), files)
    except OSError as error:
        raise StorageError(f"{path / MANIFEST}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"{path / MANIFEST}: damaged") from None
    if found.step != int(name[1]):
        raise StorageError(f"{path}: its manifest is of step {found.step}")
    return found


def verify(path: Path) -> Checkpoint:
    """:func:`read`, and every file's presence, size and SHA-256; the first that differs is named."""
    checkpoint = read(path)
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()} - {MANIFEST}
    for name in sorted({*checkpoint.files, *present}):
        file = path / name
        if name not in checkpoint.files:
            raise StorageError(f"{file}: not in the manifest")
        if name not in present or file.is_symlink():
            raise StorageError(f"{file}: missing")
        expected = checkpoint.files[name]
        if file.stat().st_size != expected["size"]:
            raise StorageError(f"{file}: {file.stat().st_size} bytes, the manifest says {expected['size']}")
        if _sha256(file) != expected["sha256"]:
            raise StorageError(f"{file}: its SHA-256 is not the manifest's; the file is damaged")
    return checkpoint


def paths(root: Path) -> list[Path]:
    """The published checkpoints below ``root``, newest first, whether valid or not; other names are ignored."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(root: Path) -> Found:
    """The newest checkpoint below ``root`` that verifies.  Call it on one rank and broadcast, or see :func:`choose`."""
    damaged: list[str] = []
    for path in paths(root):
        try:
            return Found(verify(path), damaged)
        except StorageError as error:
            damaged.append(str(error))
    return Found(None, damaged)


def choose(root: Path) -> Found:
    """:func:`newest_valid` decided by rank 0 for all ranks; :class:`StorageError` where all there are are damaged.

    A silent fresh start over damaged checkpoints would throw a run away.
    """
    found, answer = Found(None, []), None
    if dist.is_main():
        found = newest_valid(root)
        answer = [str(found.checkpoint.path) if found.checkpoint else None, found.damaged]
    path, damaged = dist.broadcast_object(answer)
    if path is None and damaged:
        raise StorageError(f"no checkpoint below {root} is whole: {damaged[0]}")
    checkpoint = found.checkpoint if dist.is_main() else read(Path(path)) if path else None
    return Found(checkpoint, damaged)


def clean(root: Path) -> None:
    """Remove what a killed writer left behind (rank 0, before the first step of a run, which owns the folder)."""
    if dist.is_main() and root.is_dir():
        for path in root.glob(f"{_STAGING}*"):
            shutil.rmtree(path, ignore_errors=True)


def retain(root: Path, limit: int | None) -> list[Path]:
    """Keep the newest ``limit`` checkpoints (None: all) and remove older ones; which were removed.

    The newest two valid ones always stay, so ``limit`` 1 keeps two.  Rank 0 only; others get an empty list.  Validity
    is by manifest and file sizes here: hashing old checkpoints after every save would cost more than writing the new.
    """
    if limit is None or not dist.is_main():
        return []
    removed, valid = [], 0
    for number, path in enumerate(paths(root)):
        keep = number < limit or valid < 2
        valid += _looks_valid(path)
        if not keep:
            # Under another name first: a kill inside rmtree must not leave a damaged checkpoint to be reported.
            doomed = root / f"{_STAGING}old-{path.name}"
            path.rename(doomed)
            shutil.rmtree(doomed)
            removed.append(path)
    return removed


def _looks_valid(path: Path) -> bool:
    try:
        files = read(path).files
        return all((path / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (StorageError, OSError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
