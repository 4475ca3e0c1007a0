"""A row that does not fit: the job ends soon, with the rank, the rows, their lengths and what to change."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

from harness import Harness
from run import Case
from shard_nonfinite import make

LONGEST = 60
"""Tokens that still fit."""
SECONDS = 30


def cases() -> list[Case]:
    """An error of torch's GPU class, and the CPU's own, in each pass."""
    return [
        Case(f"{phase}-{action}-{engine}", partial(_trial, phase, action, engine))
        for phase in ("train", "reference", "evaluation")
        for action in ("oom", "limit_as")
        for engine in ("local", "zero2", "zero3")
    ]


def _trial(phase: str, action: str, engine: str, harness: Harness) -> dict[str, Any]:
    longest = LONGEST if phase != "evaluation" else 48
    run = make(harness, engine)
    rank = 0 if engine == "local" else 1
    own = {"ALIGNLAB_CACHE": str(run.folder / "cache")} if phase == "reference" else {}
    begun = time.monotonic()
    process = run.start(fault=f"memory_{phase}:{action}_{longest}@rank{rank}:step*", **own)
    code = process.wait()
    seconds = time.monotonic() - begun
    said = str(run.status().get("error"))
    assert (code, run.status()["exit_code"]) == (7, 7), process.tail()
    assert seconds <= SECONDS, seconds
    assert said.startswith(f"rank {rank}: "), said
    assert ("can't allocate memory" if action == "limit_as" else "CUDA out of memory") in said, said
    assert "train.token_budget" in said, said
    assert ("train.gradient_checkpointing" in said) == (phase == "train"), said
    rows = re.findall(r"(sums-\w+-0-pairs-\d+) \((\d+) tokens\)", said)
    assert rows, said
    assert int(rows[0][1]) > longest, rows
    assert len(re.findall("alignlab: ", process.tail())) == 1, process.tail()
    return {"seconds": round(seconds, 1)}
