"""Publishing, finding and keeping checkpoints, in one process."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.engine import checkpoint
from alignlab.errors import StorageError


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(range(200)))
    (folder / "sub").mkdir()
    (folder / "sub" / "b.bin").write_bytes(b"x" * 1000)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_publish_then_verify(tmp_path: Path) -> None:
    done = checkpoint.publish(tmp_path, 7, write, {"fingerprint": {"seed": 1}})
    assert done.path == tmp_path / "checkpoint-7"
    assert sorted(done.files) == ["a.bin", "sub/b.bin"]
    assert checkpoint.verify(done.path) == done
    assert done.meta == {"fingerprint": {"seed": 1}}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"]


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    checkpoint.publish(tmp_path, 3, write, {"attempt": 1})
    checkpoint.publish(tmp_path, 3, write, {"attempt": 2})
    assert checkpoint.newest_valid(tmp_path).checkpoint.meta == {"attempt": 2}  # type: ignore[union-attr]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    def private(folder: Path) -> None:
        write(folder)
        (folder / "a.bin").chmod(0o600)

    before = os.umask(0o027)
    try:
        path = checkpoint.publish(tmp_path, 1, private).path
    finally:
        os.umask(before)
    assert stat.S_IMODE((path / "a.bin").stat().st_mode) == 0o640


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": lambda c: (c / "a.bin").unlink(),
    "emptied": lambda c: (c / "a.bin").write_bytes(b""),
    "halved": lambda c: (c / "sub/b.bin").write_bytes(b"x" * 500),
    "first bit": lambda c: flip(c / "a.bin", 0),
    "middle bit": lambda c: flip(c / "a.bin", 100),
    "last bit": lambda c: flip(c / "sub/b.bin", 999),
    "one byte more": lambda c: (c / "a.bin").write_bytes(bytes(range(200)) + b"!"),
    "swapped": lambda c: shutil.copy(c / "sub/b.bin", c / "a.bin"),
    "link": lambda c: ((c / "a.bin").rename(c.parent / "kept"), (c / "a.bin").symlink_to(c.parent / "kept")),
    "stranger": lambda c: (c / "more.bin").write_bytes(b"?"),
    "no manifest": lambda c: (c / "MANIFEST.json").unlink(),
    "half a manifest": lambda c: (c / "MANIFEST.json").write_text((c / "MANIFEST.json").read_text()[:100]),
    "another manifest": lambda c: (c / "MANIFEST.json").write_text("[]"),
    "manifest of another step": lambda c: shutil.copy(c.parent / "checkpoint-1/MANIFEST.json", c / "MANIFEST.json"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_named_and_the_previous_one_used(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    checkpoint.publish(tmp_path, 1, write)
    newest = checkpoint.publish(tmp_path, 2, write).path
    damage(newest)
    found = checkpoint.newest_valid(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert len(found.damaged) == 1
    assert "checkpoint-2" in found.damaged[0]


def test_all_damaged_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path / "new") == checkpoint.Found(None, [])
    flip(checkpoint.publish(tmp_path, 1, write).path / "a.bin", 5)
    with pytest.raises(StorageError, match=r"no checkpoint .* is whole: .*a.bin"):
        checkpoint.choose(tmp_path)


def test_decoys_are_ignored_and_staging_is_cleaned(tmp_path: Path) -> None:
    checkpoint.publish(tmp_path, 900, write)
    for name in ("checkpoint-000901", "checkpoint-902-bak", "step-903", ".tmp-checkpoint-904"):
        shutil.copytree(tmp_path / "checkpoint-900", tmp_path / name)
    (tmp_path / "checkpoint-905").write_text("a file")
    found = checkpoint.newest_valid(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 900
    assert not found.damaged
    checkpoint.clean(tmp_path)
    assert not (tmp_path / ".tmp-checkpoint-904").exists()
    assert (tmp_path / "checkpoint-902-bak").exists()


def test_a_failed_write_publishes_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    checkpoint.publish(tmp_path, 1, write)
    with pytest.raises(StorageError, match=r"checkpoint 2 .*No space left"):
        checkpoint.publish(tmp_path, 2, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_retention_keeps_two_valid_ones(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.publish(tmp_path, step, write)
    assert [p.name for p in checkpoint.retain(tmp_path, 3)] == ["checkpoint-2", "checkpoint-1"]
    (tmp_path / "checkpoint-5/a.bin").unlink()
    assert checkpoint.retain(tmp_path, 1) == []  # 4 and 3 are the newest two valid ones
    checkpoint.publish(tmp_path, 6, write)
    assert [p.name for p in checkpoint.retain(tmp_path, 1)] == ["checkpoint-3"]
    assert checkpoint.retain(tmp_path, None) == []
    assert [p.name for p in checkpoint.paths(tmp_path)] == ["checkpoint-6", "checkpoint-5", "checkpoint-4"]
