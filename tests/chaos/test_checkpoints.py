"""A few cases of the shards about checkpoints; all: ``scripts/chaos.sh points diskfull damage worldsize everystep``."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import shard_damage
import shard_diskfull
import shard_everystep
import shard_points
import shard_worldsize
import torch
from harness import Harness
from safetensors.torch import load_file, save_file
from straight import copy, kept, straight

from alignlab.engine import checkpoint
from alignlab.errors import StorageError


@pytest.mark.parametrize(
    ("point", "rank", "engine"),
    [
        ("mid_shard", 1, "zero2"), ("mid_manifest", 0, "zero2"), ("before_rename", 1, "zero2"),
        ("mid_collection", 0, "zero2"),
    ],
)  # fmt: skip
def test_a_kill_inside_a_save(harness: Harness, point: str, rank: int, engine: str) -> None:
    shard_points.killed_at(point, rank, engine, harness)


@pytest.mark.parametrize("number", [shard_diskfull.SIZES - 1])
def test_a_full_disk_on_one_rank(harness: Harness, number: int) -> None:
    shard_diskfull.full_at(number, "zero2", harness)


@pytest.mark.parametrize(
    ("legs", "dtype", "layout"),
    [
        ((("zero2", 2), ("local", 1)), "fp32", "tree"),
        pytest.param((("zero3", 1), ("zero3", 2)), "bf16", "packed", marks=pytest.mark.nightly),
    ],
)
def test_another_number_of_ranks(harness: Harness, legs: tuple[tuple[str, int], ...], dtype: str, layout: str) -> None:
    shard_worldsize.changed(legs, dtype, layout, harness)


def test_every_damage_is_found_and_named(harness: Harness, tmp_path: Path) -> None:
    """All of the shard's 68, without the restart."""
    hurt = kept(harness, "zero2", steps=12, save_steps=4, fault=shard_damage.HURT)
    for name in shard_damage.FILES:
        for damage, do in shard_damage.DAMAGE.items():
            root = tmp_path / f"{name}-{damage}"
            shutil.copytree(hurt.path / "checkpoints", root)
            do(root / "checkpoint-8" / name)
            found = checkpoint.choose(root)
            assert found.checkpoint is not None
            assert found.checkpoint.step == 4
            assert len(found.damaged) == 1
            assert f"checkpoint-8/{name}" in found.damaged[0], found.damaged
            assert sorted(path.name for path in root.iterdir()) == ["checkpoint-4", "damaged-checkpoint-8"]


def test_a_damaged_checkpoint_is_passed_over(harness: Harness) -> None:
    shard_damage.damaged("shard-00001.safetensors", "bit3", harness)


def test_decoys_mislead_nobody(harness: Harness) -> None:
    expected = straight(harness, "zero2", steps=12, save_steps=4)
    run = copy(kept(harness, "zero2", steps=12, save_steps=4, fault=shard_damage.HURT))
    root = run.path / "checkpoints"
    for name in ("step-9999", "checkpoint-9999", "checkpoint-12-bak"):
        (root / name).mkdir()
    shutil.copytree(root / "checkpoint-4", root / "checkpoint-000900")
    (root / "checkpoint-100").write_text("a file")
    code = run.start().wait()
    assert code == 0, run.status()
    assert run.outcome() == expected
    assert [re.sub(".*/checkpoints/", "", line) for line in run.status()["damaged"]] == [
        "checkpoint-9999/MANIFEST.json: cannot be read (No such file or directory)"
    ]
    assert {"step-9999", "checkpoint-12-bak", "checkpoint-000900", "checkpoint-100"} <= {p.name for p in root.iterdir()}


def test_a_named_checkpoint_is_taken_or_refused(harness: Harness) -> None:
    """``resume=PATH``: damage is exit 4, another run's is exit 2 with what differs, ``resume_allow`` lets it pass."""
    source = copy(kept(harness, "zero2", steps=12, save_steps=4, fault=shard_damage.HURT))
    path = source.path / "checkpoints/checkpoint-8"
    other = harness.run("zero2", steps=12, save_steps=4)
    words = (f"resume={path}", "optim.learning_rate=2e-3", "objective.beta=0.2")
    assert other.start(*words).wait() == 2
    text = other.status()["error"]
    assert "objective.beta 0.1, here 0.2; optim.learning_rate 0.001, here 0.002." in text
    assert "resume_allow=[objective.beta,optim.learning_rate]" in text
    assert other.start(*words, "resume_allow=[objective.beta,optim.learning_rate]").wait() == 0, other.status()
    assert [row["step"] for row in other.rows()] == [9, 10, 11, 12]

    same = harness.run("zero2", steps=12, save_steps=4)
    assert same.start(f"resume={path}").wait() == 0, same.status()
    assert same.outcome()["weights"] == straight(harness, "zero2", steps=12, save_steps=4)["weights"]
    shard_damage.flip(path / "engine.json", 0.5)
    damaged = harness.run("zero2", steps=12, save_steps=4)
    assert damaged.start(f"resume={path}").wait() == 4
    assert "checkpoint-8/engine.json" in damaged.status()["error"]
    # A run that has checkpoints of its own goes on from those, whatever became of where it came from.
    shutil.rmtree(same.path / "checkpoints/checkpoint-12")
    shutil.copytree(source.path / "checkpoints/checkpoint-4", same.path / "checkpoints/checkpoint-4")
    status = same.path / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "running"}))
    assert same.start(f"resume={path}").wait() == 0, same.status()
    assert [row["step"] for row in same.rows()] == [9, 10, 11, 12, *range(5, 13)]


@pytest.mark.parametrize("engine", ["local", "zero3"])
def test_adapters_on_a_changed_base_are_refused(harness: Harness, engine: str) -> None:
    run = harness.run(engine, "peft=lora", ranks=1, steps=2)
    run.finish()
    base = harness.folder / f"changed-{engine}" / "model"
    shutil.copytree(harness.model, base)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in sorted(weights) if "layers.0" in name)
    weights[name].view(torch.uint8).reshape(-1)[0] ^= 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    other = harness.run(engine, f"model={base}", "peft=lora", ranks=1, steps=2)
    words = f"resume={run.path}/checkpoints/checkpoint-2"
    assert other.start(words).wait() == 2
    assert "model.name_or_path model#" in other.status()["error"]
    assert other.start(words, "resume_allow=[model.name_or_path,base]").wait() == 2
    assert "its frozen is" in other.status()["error"], other.status()["error"]


def test_files_follow_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, exports, metrics, results: nothing readable by others, nothing private to the owner."""
    import alignlab

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o027)
    try:
        settings = {"model": "tiny", "data": "sums", "objective": "sft", "engine": "local", "run.name": "run"}
        settings |= {"data.options": {"rows": 8}, "train.max_steps": 1, "train.global_batch_size": 2}
        assert alignlab.run("train", **settings) == 0
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "runs/run").rglob("*")}
    wrong = {str(p.relative_to(tmp_path)): oct(m) for p, m in found.items() if m != (0o750 if p.is_dir() else 0o640)}
    assert not wrong
    assert {"MANIFEST.json", "model.safetensors", "metrics.jsonl", "result.json"} <= {path.name for path in found}


@pytest.mark.nightly
@pytest.mark.parametrize("case", shard_everystep.cases(), ids=lambda case: case.id)
def test_resumed_at_every_step(harness: Harness, case: object) -> None:
    case.run(harness)  # type: ignore[attr-defined]


def test_a_run_that_lost_what_it_loaded_is_noticed(harness: Harness) -> None:
    """The comparison of the nightly sees moments that were not restored."""
    hurt = kept(harness, "zero2", steps=12, save_steps=4, fault=shard_damage.HURT)
    run = copy(hurt)
    assert run.start(fault="loaded:forget@rank1:step0").wait() == 0
    with pytest.raises(AssertionError, match="replayed"):
        run.outcome()


def test_a_manifest_of_other_progress_is_refused(harness: Harness) -> None:
    """The optimizer's count and the manifest's have to agree, even where every hash does."""
    run = copy(kept(harness, "zero2", steps=12, save_steps=4, fault=shard_damage.HURT))
    manifest = run.path / "checkpoints/checkpoint-8/MANIFEST.json"
    content = json.loads(manifest.read_text())["content"]
    content["meta"]["progress"]["skipped"] = 1
    manifest.write_text(checkpoint._manifest_text(content))
    assert checkpoint.verify(manifest.parent).step == 8
    assert run.start().wait() == StorageError.exit_code
    assert "8 updates, its manifest says 8 steps, 1 of them skipped" in run.status()["error"]
