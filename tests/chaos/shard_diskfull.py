"""A disk that is full for one rank: no file of rank 1 may grow beyond a limit, 8 limits, 4 engines: 32 cases.

The run ends with code 4 and one line that names the file, the bytes needed and the bytes free; nothing is published,
the earlier checkpoint stands, all ranks are gone within 30 s, and without the limit the run goes on bit-identically.
"""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

from harness import Harness
from run import Case
from straight import kept

from alignlab.engine import checkpoint

ENGINES = ("zero0", "zero1", "zero2", "zero3")
STEPS, EVERY, FULL = 12, 4, 8
SIZES = 8
SECONDS = 30.0


def full_at(number: int, engine: str, harness: Harness) -> dict[str, Any]:
    """Limit ``number``: the first is a page, the last a byte less than the shard."""
    straight = kept(harness, engine, steps=STEPS, save_steps=EVERY)
    shard = straight.path / f"checkpoints/checkpoint-{STEPS}/shard-00001.safetensors"
    most, least = shard.stat().st_size - 1, 4096
    limit = round(least * (most / least) ** (number / (SIZES - 1)))
    run = harness.run(engine, steps=STEPS, save_steps=EVERY)
    code = run.start(fault=f"forward:limit_{limit}@rank1:step{FULL}").wait()
    stopped = time.time() - float(run.rows()[-1]["time"])
    status = run.status()
    assert code == 4, (code, status)
    assert status["exit_code"] == 4
    assert stopped <= SECONDS, f"took {stopped:.1f} s to stop"
    text = status["error"]
    assert re.search(rf"rank 1: cannot write checkpoint {FULL} .*bytes needed, [\d,]+ free.*shard-00001", text), text
    assert "\n" not in text
    root = run.path / "checkpoints"
    assert [path.name for path in root.iterdir()] == [f"checkpoint-{FULL - EVERY}"], list(root.iterdir())
    checkpoint.verify(root / f"checkpoint-{FULL - EVERY}")
    assert run.finish() == straight.outcome()
    return {"limit": limit, "shard": most + 1, "stopped": round(stopped, 2)}


def cases() -> list[Case]:
    """32."""
    return [Case(f"limit{n}-{engine}", partial(full_at, n, engine)) for engine in ENGINES for n in range(SIZES)]
