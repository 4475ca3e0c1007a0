"""Resumed at every step of two epochs: 40 of 40 end bit-identical; and two controls that must not.

The adapters' dropout is on, so the draws of every step have to be the same again.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

from harness import Harness, Run
from run import Case
from straight import copy, kept

STEPS = 40
SETTINGS = (
    "data.options={rows: 80}", "train.max_steps=null", "train.num_train_epochs=2", "train.save_total_limit=null",
    "peft=lora", "peft.lora_dropout=0.1", "optim.learning_rate=1e-2",
)  # fmt: skip


def whole(harness: Harness) -> tuple[Run, dict[str, Any]]:
    """A run with a checkpoint of every step."""
    run = kept(harness, "zero2", *SETTINGS, save_steps=1)
    assert run.checkpoints() == list(range(1, STEPS + 1)), run.checkpoints()
    assert run.rows()[-1]["epoch"] > 1, run.rows()[-1]
    return run, run.outcome()


def back_to(step: int, harness: Harness) -> tuple[Run, dict[str, Any]]:
    """A copy of the run as it was right after ``step``, but for the metrics written since."""
    run, outcome = whole(harness)
    twin = copy(run)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(twin.path / f"checkpoints/checkpoint-{later}")
    shutil.rmtree(twin.path / "model")
    (twin.path / "status.json").write_text((twin.path / "status.json").read_text().replace('"done"', '"running"'))
    return twin, outcome


def resumed_at(step: int, harness: Harness) -> dict[str, Any]:
    """One case.  ``Run.curve`` compares the replayed steps with the first time, bit for bit."""
    twin, expected = back_to(step, harness)
    outcome = twin.finish()
    assert outcome == expected, f"{outcome}\nand, straight, {expected}"
    assert len(twin.rows()) == STEPS + STEPS - step, "not resumed at that step"
    return {}


def control(fault: str, harness: Harness) -> dict[str, Any]:
    """Something is not restored: the comparison must notice."""
    twin, expected = back_to(7, harness)
    assert twin.start(fault=fault).wait() == 0
    try:
        assert twin.outcome() != expected
    except AssertionError as error:
        if "replayed" not in str(error):
            raise
    return {}


def cases() -> list[Case]:
    """40 and 2."""
    found = [Case(f"step{step:02d}", partial(resumed_at, step)) for step in range(1, STEPS + 1)]
    controls = {"moments": "loaded:forget@rank1:step0", "dropout": "forward:draw@rank1:step9"}
    return found + [Case(f"control-{name}", partial(control, fault)) for name, fault in controls.items()]
