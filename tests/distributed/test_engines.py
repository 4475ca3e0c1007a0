"""Every engine trains the same numbers, at 1 and 2 ranks, and goes on bit for bit from its checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cells import AFTER, BEFORE, CELLS, LOCAL, cells_of  # noqa: E402
from spawn import spawn  # noqa: E402

ENGINES = ("zero0", "zero1", "zero2", "zero3")
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-4, "lora": 1e-6, "rmsprop": 1e-5, "offload": 1e-6}
ORACLE = {"offload": "fp32"}


@pytest.fixture(scope="session")
def world1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world1")
    result = spawn(HERE / "cells.py", "everything", 1, folder, folder=str(folder), sources={})
    return {"folder": folder, "ranks": result}


@pytest.fixture(scope="session")
def world2(world1: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world2")
    sources = {kind: str(world1["folder"] / f"local-{kind}") for kind in ("fp32", "bf16", "lora", "rmsprop")}
    sources["offload"] = sources["fp32"]
    result = spawn(HERE / "cells.py", "everything", 2, folder, folder=str(folder), sources=sources)
    return {"folder": folder, "ranks": result}


@pytest.fixture(params=[1, 2])
def world(request: pytest.FixtureRequest, world1: dict[str, Any], world2: dict[str, Any]) -> dict[str, Any]:
    return {1: world1, 2: world2}[request.param]


@pytest.fixture
def both(world1: dict[str, Any], world2: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {1: world1, 2: world2}


def close(a: list[list[float]], b: list[list[float]], tolerance: float) -> None:
    """Losses and gradient norms of each step; norms react ten times as strongly to a change of the parameters."""
    for (loss, norm), (other_loss, other_norm) in zip(a, b, strict=True):
        assert loss == pytest.approx(other_loss, rel=tolerance)
        assert norm == pytest.approx(other_norm, rel=10 * tolerance)


@pytest.mark.parametrize(("ranks", "cell"), [(r, c) for r in (1, 2) for c in cells_of(r) if c not in LOCAL])
def test_same_curve_as_local(both: dict[int, dict[str, Any]], ranks: int, cell: str) -> None:
    kind = cell.split("-")[1]
    oracle = both[1]["ranks"][0]["curves"][f"local-{ORACLE.get(kind, kind)}"]
    for rank in both[ranks]["ranks"]:
        found = rank["curves"][cell]
        assert len(found["curve"]) == BEFORE
        close(found["curve"] + found["after"], oracle["curve"] + oracle["after"], TOLERANCE[kind])


@pytest.mark.parametrize(("ranks", "cell"), [(r, c) for r in (1, 2) for c in cells_of(r)])
def test_resume_is_bit_equal(both: dict[int, dict[str, Any]], ranks: int, cell: str) -> None:
    for rank in both[ranks]["ranks"]:
        found = rank["curves"][cell]
        assert found["loaded"] == found["saved"]
        assert found["again"] == found["after"]
        assert found["end_again"] == found["end"]
        assert found["updates"] == BEFORE + AFTER
        assert found["end"] != found["saved"]
        moments = {"square_avg"} if cell.endswith("rmsprop") else {"exp_avg", "exp_avg_sq"}
        assert {key.split("/")[1] for key in found["saved"]} == {"param"} | moments


@pytest.mark.parametrize(("ranks", "cell"), [(r, c) for r in (1, 2) for c in cells_of(r)])
def test_the_optimizer_counts_its_updates(both: dict[int, dict[str, Any]], ranks: int, cell: str) -> None:
    """None when it is made (wrappers of DeepSpeed make a dummy one), as many as were done, and so after a load."""
    for rank in both[ranks]["ranks"]:
        made, trained, loaded = rank["curves"][cell]["counters"]
        assert made in ([], [0.0])
        assert trained == loaded == [float(BEFORE)]


@pytest.mark.parametrize("cell", CELLS)
def test_another_engine_and_world_size_go_on(world1: dict[str, Any], world2: dict[str, Any], cell: str) -> None:
    kind = cell.split("-")[1]
    oracle = world1["ranks"][0]["curves"][f"local-{ORACLE.get(kind, kind)}"]
    for rank in world2["ranks"]:
        assert rank["crossed"][cell]["updates"] == BEFORE
        close(rank["crossed"][cell]["curve"], oracle["after"], TOLERANCE[kind])


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_hand_over_to_one_process(world2: dict[str, Any], name: str) -> None:
    from cells import resumed

    found = world2["ranks"][0]["curves"][f"{name}-fp32"]
    close(resumed({"name": "local"}, world2["folder"] / f"{name}-fp32")["curve"], found["after"], 1e-6)


@pytest.mark.nightly
def test_four_ranks_go_on_and_hand_back(world1: dict[str, Any], tmp_path: Path) -> None:
    """1 -> 4 -> 1 processes: the odd sizes leave some ranks of ZeRO-3 without a share of small parameters."""
    from cells import resumed

    after = world1["ranks"][0]["curves"]["local-fp32"]["after"]
    source = str(world1["folder"] / "local-fp32")
    for rank in spawn(HERE / "cells.py", "pass_on", 4, tmp_path, source=source, folder=str(tmp_path)):
        for curve in rank.values():
            close(curve, after, 1e-6)
    for name in ENGINES:
        close(resumed({"name": "local"}, tmp_path / name)["curve"], after, 1e-6)


def test_parity_would_notice_a_wrong_divisor(world1: dict[str, Any]) -> None:
    """The curve's bound is far below what a different optimizer or clipping does to it."""
    curves = world1["ranks"][0]["curves"]
    with pytest.raises(AssertionError):
        close(curves["local-rmsprop"]["curve"], curves["local-fp32"]["curve"], 1e-3)
    assert any(norm > 0.5 for _, norm in curves["local-fp32"]["curve"])  # clipping was at work


@pytest.mark.parametrize("name", ENGINES)
def test_export_and_scores_in_eval_mode(world: dict[str, Any], name: str) -> None:
    found = [rank["details"][name] for rank in world["ranks"]]
    assert found[0]["same_scores"] is True
    assert found[0]["names"][:3] == ["embed.weight", "head.weight", "layer.bias"]
    assert all(other["names"] == [] for other in found[1:])


@pytest.mark.parametrize("name", ENGINES)
def test_nan_on_one_rank_updates_nothing(world: dict[str, Any], world1: dict[str, Any], name: str) -> None:
    for rank in world["ranks"]:
        found = rank["details"][name]
        assert found["poisoned_norm"] in ("nan", "inf")
        assert found["unchanged"]
        assert found["skipped"] == 1
        expected = world1["ranks"][0]["details"]["zero0"]["loss_after"]
        assert found["loss_after"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ENGINES)
def test_gradient_norms_by_parameter(world: dict[str, Any], world1: dict[str, Any], name: str) -> None:
    """Before clipping, the same as the plain engine's, and taking them changes nothing."""
    expected = world1["ranks"][0]["details"]["local"]["norms"]
    for rank in world["ranks"]:
        found = rank["details"][name]
        assert found["norms"] == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert found["norms"]["unused.weight"] == 0.0
        assert sum(n**2 for n in found["norms"].values()) ** 0.5 == pytest.approx(found["norm"], rel=1e-6)


def test_publish_all_or_nothing(world: dict[str, Any]) -> None:
    ranks = len(world["ranks"])
    for rank in world["ranks"]:
        found = rank["publish"]
        assert found["step"] == 1
        assert found["files"] == ["engine.json", *(f"shard-{r:05d}.safetensors" for r in range(ranks))]
        assert found["left"] == ["checkpoint-1"]
        named = f"rank {ranks - 1}: " if ranks > 1 else ""
        assert found["errors"]["after"].startswith(f"{named}cannot write checkpoint 2")
        assert found["errors"]["after"].endswith("No space left on device")
        assert found["errors"]["before"].endswith("a bug")
        assert "checkpoint-1/engine.json" in found["errors"]["damaged"]


def test_collectives(world: dict[str, Any]) -> None:
    ranks = len(world["ranks"])
    for rank in world["ranks"]:
        found = rank["collectives"]
        assert found["reduce"] == pytest.approx([sum(range(1, ranks + 1)), 0.1 * ranks], rel=1e-15)
        assert found["gather"] == [0, 10, 11][: 2 * ranks - 1]
        assert found["empty"] == []
        assert found["objects"] == [{"rank": r, "text": "é" * r} for r in range(ranks)]
        assert found["broadcast"] == [1, {"a": None}]
        if ranks > 1:
            assert found["agree"] == "ranks disagree about the index: rank 0 has 0, rank 1 1"
            assert found["together"] == ["ConfigError", "rank 1: bad key"]


def test_deepspeed_is_quiet_on_the_console(world: dict[str, Any]) -> None:
    for number in range(len(world["ranks"])):
        log = (world["folder"] / f"spawn-everything-{len(world['ranks'])}" / f"log{number}.txt").read_text()
        assert log.count("\n") <= 3, log[:2000]


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    first, second = spawn(HERE / "cells.py", "missing_rank", 2, tmp_path, timeout=60)
    assert first.startswith("rank 0 waited in vain")
    assert "Ranks 1 failed" in first
    assert second == ""
