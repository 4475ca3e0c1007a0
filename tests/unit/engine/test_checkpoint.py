"""Publishing, finding and keeping checkpoints, in one process."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignlab.engine import checkpoint
from alignlab.errors import ConfigError, StorageError


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


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


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
    "a number in the manifest": lambda c: edit(c / "MANIFEST.json", '"world_size": 1', '"world_size": 3'),
    "space in the manifest": lambda c: edit(c / "MANIFEST.json", "\n", "\n\n"),
    "manifest of another step": lambda c: shutil.copy(c.parent / "checkpoint-1/MANIFEST.json", c / "MANIFEST.json"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_named_and_the_previous_one_used(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    checkpoint.publish(tmp_path, 1, write)
    newest = checkpoint.publish(tmp_path, 2, write).path
    damage(newest)
    with pytest.raises(StorageError, match="checkpoint-2"):
        checkpoint.verify(newest)
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
    with pytest.raises(StorageError, match=r"checkpoint 2 below .*No space left"):
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


def test_nothing_is_begun_on_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.publish(tmp_path, 1, write, needed=1200)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=checkpoint.SPARE_BYTES + 1199))
    with pytest.raises(
        StorageError, match=r"checkpoint 2 below .* \(1,200 bytes needed, 1,049,775 free\): .*save_total"
    ):
        checkpoint.publish(tmp_path, 2, write, needed=1200)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=checkpoint.SPARE_BYTES + 1200))
    assert checkpoint.publish(tmp_path, 2, write, needed=1200).step == 2


def test_the_bytes_an_engine_needs_are_those_it_writes(tmp_path: Path) -> None:
    from alignlab.engine import shards

    fragments = [shards.Fragment("a", 0, {"param": torch.zeros(500), "exp_avg": torch.zeros(500)})]
    shards.write_shard(tmp_path, 0, fragments)
    assert shards.byte_count(fragments) == 4000
    assert 4000 <= (tmp_path / "shard-00000.safetensors").stat().st_size < 4500


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is saved again over a whole checkpoint: one of the two is there after any kill."""
    checkpoint.publish(tmp_path, 1, write, {"attempt": 1})
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == ".tmp-checkpoint-1":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.publish(tmp_path, 1, write, {"attempt": 2})
    monkeypatch.undo()
    assert checkpoint.paths(tmp_path) == []
    checkpoint.clean(tmp_path)
    assert checkpoint.newest_valid(tmp_path).checkpoint.meta == {"attempt": 1}  # type: ignore[union-attr]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_damaged_ones_get_out_of_the_way(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.publish(tmp_path, step, write, {"attempt": 1})
    for _ in range(2):  # the step is saved again, damaged again, and passed over again
        flip(tmp_path / "checkpoint-3/a.bin", 7)
        found = checkpoint.choose(tmp_path)
        assert found.checkpoint is not None
        assert found.checkpoint.step == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "damaged-checkpoint-3"]
        checkpoint.publish(tmp_path, 3, write)
        assert checkpoint.choose(tmp_path).checkpoint.step == 3  # type: ignore[union-attr]
    assert checkpoint.retain(tmp_path, 2) == [tmp_path / "checkpoint-1"]


def test_a_named_checkpoint_has_to_be_whole(tmp_path: Path) -> None:
    path = checkpoint.publish(tmp_path, 1, write).path
    assert checkpoint.choose_path(path).checkpoint == checkpoint.verify(path)
    flip(path / "a.bin", 0)
    with pytest.raises(StorageError, match=r"a\.bin: its SHA-256"):
        checkpoint.choose_path(path)
    assert path.exists()


def test_a_manifest_of_a_later_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    path = checkpoint.publish(tmp_path, 1, write).path / checkpoint.MANIFEST
    content = json.loads(path.read_text())["content"] | {"format": 2}
    path.write_text(checkpoint._manifest_text(content))
    with pytest.raises(ConfigError, match="of format 2, this version reads 1"):
        checkpoint.choose(tmp_path)


@pytest.mark.parametrize("kinds", [(), ("exp_avg",), ("exp_avg_sq",), ("exp_avg", "exp_avg_sq", "more")])
def test_a_missing_part_of_the_optimizer_is_an_error(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    from alignlab.engine import shards

    values = {kind: torch.zeros(3) for kind in ("param", *kinds)}
    shards.write_shard(tmp_path, 0, [shards.Fragment("weight", 0, values)])
    with shards.ShardReader(tmp_path) as reader:
        assert reader.moments("weight", "adamw", 0) == []
        with pytest.raises(StorageError, match="of the optimizer's state of weight it holds"):
            reader.moments("weight", "adamw", 1)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the manifest, then the folders, then the rename, then the parent: power may fail in between."""
    events: list[tuple[str, str]] = []
    sync, rename = checkpoint.sync, Path.rename

    def noted_sync(path: Path) -> None:
        events.append(("sync", path.name))
        sync(path)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(checkpoint, "sync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    checkpoint.publish(tmp_path, 1, write)
    assert ("sync", "sub") in events[: events.index(("rename", "checkpoint-1"))]
    at = {event: number for number, event in enumerate(events)}
    assert at["sync", "a.bin"] < at["sync", checkpoint.MANIFEST] < at["rename", "checkpoint-1"]
    assert at["sync", ".tmp-checkpoint-1"] < at["rename", "checkpoint-1"] < at["sync", tmp_path.name]
