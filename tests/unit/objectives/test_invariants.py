"""Every registered objective, and every loss type, keeps the invariants; and the suite notices when one does not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from alignlab.errors import CheckFailed
from alignlab.metrics import stat
from alignlab.objectives.base import BaseObjective, sequence_sums, sequence_value
from alignlab.objectives.dpo import DPO, DPOConfig
from alignlab.objectives.ift import IFT, IFTConfig
from alignlab.objectives.pair_losses import LOSS_TYPES
from alignlab.objectives.reward import Reward, RewardConfig
from alignlab.objectives.sft import SFT, SFTConfig
from alignlab.registry import OBJECTIVES
from alignlab.testing import check_objective
from alignlab.types import Ask, LossOutput, Unit


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_registered_objectives(name):
    check_objective(OBJECTIVES.get(name))


@pytest.mark.parametrize("name", [n for n in LOSS_TYPES if n not in ("sft", "sigmoid")])
def test_loss_types(name):
    check_objective(DPO, DPOConfig(loss_type=name, label_smoothing=0.1 if name == "exo_pair" else 0.0), knobs=False)


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        (SFT, SFTConfig(unit="sequence")),
        (DPO, DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])),
        (DPO, DPOConfig(loss_type="bco_pair", bco_running_mean=True)),
        (Reward, RewardConfig(loss_type="eurus", center_rewards_coefficient=0.1)),
        (IFT, IFTConfig(max_lambda=0.0, gamma=0.0)),
        (IFT, IFTConfig(embeddings="frozen", residual="sample")),
        (IFT, IFTConfig(propagation="linear", lambda_schedule="linear", lambda_disturb="normal")),
        (IFT, IFTConfig(propagation_side="right", propagation_norm="softmax", propagation_type="logps")),
    ],
)
def test_variants(objective, config):
    check_objective(objective, config, knobs=False)


@dataclass
class MineConfig:
    scale: float = 1.0


class Mine(BaseObjective):
    """What a user's plug-in looks like."""

    name = "mine"
    Config = MineConfig

    def __call__(self, score, batch, context):
        logps = score(batch, Ask("logps")).logps
        losses = -self.config.scale * sequence_sums(logps[batch.seq_idx], batch)
        weights = sequence_value(batch, "weight", losses)
        return LossOutput({Unit.SEQUENCE: (weights * losses).sum()}, {"loss/mine": stat(losses, weights)})


def test_a_sound_objective_from_outside_passes():
    check_objective(Mine)


class TakesTheMean(Mine):
    def __call__(self, score, batch, context):
        output = super().__call__(score, batch, context)
        return output._replace(sums={Unit.SEQUENCE: output.sums[Unit.SEQUENCE] / batch.last.numel()})


class ForgetsWeights(Mine):
    def __call__(self, score, batch, context):
        logps = score(batch, Ask("logps")).logps
        return LossOutput({Unit.SEQUENCE: -sequence_sums(logps[batch.seq_idx], batch).sum()}, {})


class CountsSharedTokensOnce(Mine):
    def __call__(self, score, batch, context):
        return LossOutput({Unit.SEQUENCE: -score(batch, Ask("logps")).logps.sum()}, {})


class StatisticOfTheBatch(Mine):
    def __call__(self, score, batch, context):
        output = super().__call__(score, batch, context)
        return output._replace(stats={"size": stat(torch.tensor(float(batch.last.numel())))})


class IsRandom(Mine):
    def __call__(self, score, batch, context):
        output = super().__call__(score, batch, context)
        return output._replace(
            sums={Unit.SEQUENCE: output.sums[Unit.SEQUENCE] * (1 + 1e-9 * torch.rand((), dtype=torch.float64))}
        )


@dataclass
class DeadConfig:
    scale: float = 1.0
    unread: bool = False


class HasADeadKnob(Mine):
    Config = DeadConfig


@dataclass
class SilentConfig:
    scale: float = 1.0
    mode: str = field(default="a")


class HasAKnobNobodyCanTurn(Mine):
    Config = SilentConfig


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (TakesTheMean, "sums must be sums"),
        (ForgetsWeights, "twice every weight"),
        (CountsSharedTokensOnce, "tree against"),
        (StatisticOfTheBatch, "statistic size"),
        (IsRandom, "the same step twice"),
        (HasADeadKnob, "mine.unread changes neither loss nor gradients"),
        (HasAKnobNobodyCanTurn, "Config.mode: say how to change it"),
    ],
)
def test_broken_objectives_are_caught(objective, message):
    with pytest.raises(CheckFailed, match=message):
        check_objective(objective)
