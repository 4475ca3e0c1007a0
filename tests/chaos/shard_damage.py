"""A damaged newest checkpoint, end to end: each file of a ZeRO-2 checkpoint, 17 kinds of damage, 68 cases.

The start says which file is damaged, takes the checkpoint before it, saves the damaged step anew, and ends
bit-identical to an untouched run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import Harness
from run import Case
from straight import copy, kept, straight

from alignlab.engine import checkpoint
from alignlab.errors import StorageError

STEPS, EVERY = 12, 4
FILES = ("MANIFEST.json", "engine.json", "shard-00000.safetensors", "shard-00001.safetensors")
FLIPS = 8


def flip(file: Path, share: float) -> None:
    """Turn one bit over, ``share`` of the way into the file."""
    data = bytearray(file.read_bytes())
    data[round(share * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def cut(file: Path, size: Callable[[int], int]) -> None:
    """Cut the file to ``size(its size)``."""
    os.truncate(file, size(file.stat().st_size))


def of_the_step_before(file: Path) -> None:
    """The same file of the checkpoint before."""
    step = int(file.parent.name.rpartition("-")[2])
    shutil.copy(file.parent.with_name(f"checkpoint-{step - EVERY}") / file.name, file)


def another_file(file: Path) -> None:
    """The contents of the next file of the same checkpoint."""
    shutil.copy(file.with_name(FILES[(FILES.index(file.name) + 1) % len(FILES)]), file)


def a_folder(file: Path) -> None:
    """A folder of that name."""
    file.unlink()
    file.mkdir()


def one_byte_more(file: Path) -> None:
    """A line's end more: what a JSON reader would not mind."""
    with file.open("ab") as stream:
        stream.write(b"\n")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "emptied": lambda file: cut(file, lambda size: 0),
    "one_byte": lambda file: cut(file, lambda size: 1),
    "halved": lambda file: cut(file, lambda size: size // 2),
    "one_byte_less": lambda file: cut(file, lambda size: size - 1),
    "one_byte_more": one_byte_more,
    "step_before": of_the_step_before,
    "another_file": another_file,
    "folder": a_folder,
    **{f"bit{n}": partial(flip, share=n / (FLIPS - 1)) for n in range(FLIPS)},
}

HURT = "forward:kill@rank*:step11"
"""Between the checkpoints 8 and 12."""


def damaged(name: str, damage: str, harness: Harness) -> dict[str, Any]:
    """One case."""
    expected = straight(harness, "zero2", steps=STEPS, save_steps=EVERY)
    run = copy(kept(harness, "zero2", steps=STEPS, save_steps=EVERY, fault=HURT))
    assert run.checkpoints() == [4, 8], run.checkpoints()
    newest = run.path / "checkpoints/checkpoint-8"
    DAMAGE[damage](newest / name)
    try:
        checkpoint.verify(newest)
    except StorageError as error:
        said = str(error)
    else:
        raise AssertionError("not detected")
    assert name in said, said
    assert run.finish() == expected
    assert run.status()["damaged"] == [said.removeprefix(f"{run.folder}/")], run.status()
    assert f"checkpoint-8/{name}" in (run.folder / "start-1.txt").read_text()
    root = run.path / "checkpoints"
    assert run.checkpoints() == [4, 8, 12]
    assert sorted(p.name for p in root.iterdir() if "damaged" in p.name) == ["damaged-checkpoint-8"]
    assert checkpoint.verify(newest).step == 8
    return {"said": said.removeprefix(str(root))}


def cases() -> list[Case]:
    """68."""
    return [Case(f"{name}-{damage}", partial(damaged, name, damage)) for name in FILES for damage in DAMAGE]
