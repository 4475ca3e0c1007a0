"""The bytes that ``measuring/memory.py`` predicts are those that DeepSpeed's optimizers hold, on each of two ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from spawn import spawn  # noqa: E402

ORDINARY: dict[str, dict[str, Any]] = {
    "zero0-fp32": {"name": "zero0"},
    **{f"{name}-fp32": {"name": name} for name in ("zero1", "zero2", "zero3")},
    **{f"{name}-bf16": {"name": name, "dtype": "bf16"} for name in ("zero1", "zero2", "zero3")},
    "zero2-bf16-one-group": {"name": "zero2", "dtype": "bf16", "weight_decay": 0.0},
    **{f"{name}-bf16-lora": {"name": name, "dtype": "bf16", "adapter": True} for name in ("zero1", "zero2", "zero3")},
}
OFFLOADED: dict[str, dict[str, Any]] = {
    f"{name}-{dtype}-offload": {"name": name, "dtype": dtype, "offload": True}
    for name in ("zero1", "zero2", "zero3")
    for dtype in ("fp32", "bf16")
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(HERE / "memory_cells.py", "everything", 2, tmp_path_factory.mktemp("memory"), cells=ORDINARY)


@pytest.fixture(scope="module")
def offloading_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(HERE / "memory_cells.py", "everything", 2, tmp_path_factory.mktemp("offload"), cells=OFFLOADED)


def check(found: list[Any], stage: str) -> None:
    """Exactly; but ZeRO-2's buckets are gone between passes, and its gradients are predicted for the fuller rank."""
    for rank in found:
        predicted, real = dict(rank["predicted"]), dict(rank["real"])
        if stage == "zero2":
            del predicted["buffers"]
            real["gradients"] = max(one["real"]["gradients"] for one in found)
        assert {name: real[name] for name in predicted} == predicted


@pytest.mark.parametrize("cell", ORDINARY)
def test_every_rank_holds_what_was_predicted(ranks: list[Any], cell: str) -> None:
    check([rank[cell] for rank in ranks], ORDINARY[cell]["name"])


@pytest.mark.nightly
@pytest.mark.parametrize("cell", OFFLOADED)
def test_and_so_with_what_is_offloaded(offloading_ranks: list[Any], cell: str) -> None:
    check([rank[cell] for rank in offloading_ranks], OFFLOADED[cell]["name"])


def test_deepspeeds_own_estimates(ranks: list[Any]) -> None:
    """10,000 parameters over 4 ranks.  ZeRO-2: theirs keeps a rank's gradients in 16 bits beside those in 32, 2 bytes a
    parameter and rank more than there is.  ZeRO-3: 18 bytes, the same.  Ours has AdamW's count of updates, a float32.
    """
    two, three = (ranks[0]["estimates"][name] for name in ("zero2", "zero3"))
    assert two == [20_000 + 18 * 2_500, 20_000 + 16 * 2_500 + 4]
    assert three == [18 * 2_500, 18 * 2_500 + 4]
