"""SIGKILL at each of nine points of a save, on each of two ranks, in four engines: 72 cases.

After it: the next start goes on by itself, saves the same step again, and ends bit-identical to an untouched run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from harness import Harness
from run import Case
from straight import straight

POINTS = (
    "before_mkdir", "after_mkdir", "mid_shard", "after_shard", "before_manifest", "mid_manifest", "before_rename",
    "after_rename", "mid_collection",
)  # fmt: skip
ENGINES = ("zero0", "zero1", "zero2", "zero3")
STEPS, EVERY, KILLED = 12, 3, 9
SETTINGS = ("train.save_total_limit=2",)
"""Saves at 3, 6, 9 and 12; the one at 9 collects checkpoint-3, which the newest two no longer include."""


def killed_at(point: str, rank: int, engine: str, harness: Harness) -> dict[str, Any]:
    """One case."""
    expected = straight(harness, engine, *SETTINGS, steps=STEPS, save_steps=EVERY)
    run = harness.run(engine, *SETTINGS, steps=STEPS, save_steps=EVERY)
    code = run.start(fault=f"{point}:kill@rank{rank}:step{KILLED}").wait()
    assert code != 0, "the fault did not strike"
    assert max(row["step"] for row in run.rows()) == KILLED, "killed at another step"
    left, whole = run.leftovers(), run.checkpoints()
    # Rank 0 outlives rank 1 and may still finish what it was about to do.
    published = KILLED in whole
    assert published or rank == 1 or point not in ("after_rename", "mid_collection")
    assert not published or point in ("after_rename", "mid_collection") or rank == 1
    assert {3, 6} <= set(whole) or published, whole
    outcome = run.finish()
    assert outcome == expected, f"{outcome}\nand, straight, {expected}"
    assert run.leftovers() == [], run.leftovers()
    assert run.checkpoints() == [9, 12], run.checkpoints()
    return {"left": left, "published": published, "code": code}


def cases() -> list[Case]:
    """72."""
    return [
        Case(f"{point}-rank{rank}-{engine}", partial(killed_at, point, rank, engine))
        for engine in ENGINES
        for rank in (0, 1)
        for point in POINTS
    ]
