"""Every option of every objective moves the loss or a gradient where it applies, and is read exactly there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from alignlab.config import OptimConfig
from alignlab.configuration.schema import objective_config
from alignlab.errors import CheckFailed, ConfigError
from alignlab.liveness import read_in_training
from alignlab.objectives.base import BaseObjective, sequence_sums, sequence_value
from alignlab.objectives.pair_losses import LOSS_TYPES
from alignlab.registry import OBJECTIVES
from alignlab.testing import NO_EFFECT, World, check_objective, distance, knob_effects
from alignlab.types import Ask, LossOutput, Unit

EXEMPT: dict[tuple[str, str], str] = {}
"""(objective, field): why two samples cannot show that it does something.  None needs to be."""


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_field_moves_two_samples(name: str) -> None:
    objective = OBJECTIVES.get(name)
    effects = knob_effects(objective, samples=2)
    assert set(effects) == {field.name for field in fields(objective.Config)}
    dead = {key for key, (_, _, effect) in effects.items() if effect <= NO_EFFECT}
    assert dead == {key for owner, key in EXEMPT if owner == name}
    assert all(EXEMPT.values())


def other_values(section: Any, field: str) -> list[Any]:
    """Values to try in the place of the present one."""
    choices: dict[str, list[Any]] = {
        "loss_weights": [[0.5] * len(getattr(section, "loss_type", ""))],
        "lambda_schedule": [None, "linear"],
        "lambda_disturb": [None, "normal"],
        "propagation": ["product", "linear", "none"],
        "propagation_type": ["loss", "logps", "mask"],
        "propagation_side": ["left", "right"],
        "propagation_norm": ["L1", "L2", "log"],
        "embeddings": ["trained", "frozen"],
        "residual": ["greedy", "sample"],
        "unit": ["token", "sequence"],
    }
    now = getattr(section, field)
    if isinstance(now, bool):
        return [not now]
    if field in choices:
        return [value for value in choices[field] if value != now]
    return [0.3, 0.45] if now is None else [now * 0.5 + 0.13]


def smoothing(loss_type: str) -> dict[str, float]:
    return {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *(("dpo", {"loss_type": name, **smoothing(name)}) for name in LOSS_TYPES if name != "sft"),
    ("dpo", {"loss_type": ["hinge", "sft"]}),
    ("dpo", {"loss_type": ["ipo", "simpo"]}),
    ("dpo", {"loss_type": "bco_pair", "bco_running_mean": True}),
    ("dpo", {"reference_free": True}),
    ("cpo", {"loss_type": "hinge"}),
    ("cpsft", {}),
    ("sft", {"unit": "sequence"}),
    ("kto", {}),
    ("reward", {}),
    ("reward", {"loss_type": "eurus"}),
    ("ift", {}),
    ("ift", {"max_lambda": 0.0}),
    ("ift", {"gamma": 0.0}),
    ("ift", {"propagation": "linear"}),
    ("ift", {"propagation": "none"}),
    ("ift", {"lambda_schedule": "linear", "min_lambda": 0.1}),
    ("ift", {"lambda_disturb": "normal"}),
    ("ift", {"propagation_type": "logps", "propagation_norm": "log"}),
]
SELECT = {"loss_type", "lambda_schedule", "lambda_disturb", "propagation"}
"""Fields that choose what else is read, and are therefore always read; that they act is the test above."""


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=lambda value: str(value))
def test_what_is_read_is_what_moves_the_step(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    """The dry pass that refuses a knob may err in neither direction: it is held against perturbation."""
    objective, kind = OBJECTIVES.get(name), objective_config(name)
    section = kind(**options)
    reads = read_in_training(section, OptimConfig())
    assert reads is not None
    world = World(tmp_path, objective.head, 0, 2)
    base = world.step(objective(section), naive=True)
    found: dict[str, float] = {}
    for field in fields(objective.Config):
        if field.name in SELECT:
            continue
        found[field.name] = 0.0
        for value in other_values(section, field.name):
            try:
                other = kind(**{**options, field.name: value})
            except ConfigError:
                continue
            found[field.name] = max(found[field.name], distance(world.step(objective(other), naive=True), base))
    moves = {f"objective.{key}" for key, effect in found.items() if effect > NO_EFFECT}
    selected = {f"objective.{key}" for key in SELECT}
    assert {key for key in reads if key.startswith("objective.")} - {"objective.name"} - selected == moves, found


# ---------------------------------------------------------------------------------------------------------------
# The checks notice
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class IdleConfig:
    scale: float = 1.0
    idle: float = 1.0


class Idle(BaseObjective):
    """Reads ``idle`` and does nothing with it."""

    name = "idle"
    Config = IdleConfig

    def __call__(self, score: Any, batch: Any, context: Any) -> LossOutput:
        logps = score(batch, Ask("logps")).logps
        losses = -self.config.scale * sequence_sums(logps[batch.seq_idx], batch) + 0.0 * self.config.idle
        weights = sequence_value(batch, "weight", losses)
        return LossOutput({Unit.SEQUENCE: (weights * losses).sum()}, {})


def test_a_field_without_effect_is_found() -> None:
    assert [key for key, (_, _, effect) in knob_effects(Idle, samples=2).items() if effect <= NO_EFFECT] == ["idle"]
    with pytest.raises(CheckFailed, match=r"idle\.idle changes neither"):
        check_objective(Idle)
