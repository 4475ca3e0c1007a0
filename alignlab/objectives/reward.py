"""Reward modelling: a scalar for an answer, learnt from pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.metrics import stat
from alignlab.objectives.base import BaseObjective, one_of, pair_value, within
from alignlab.types import Ask, LossOutput, PackedBatch, Score, StepContext, Unit


@dataclass
class RewardConfig:
    """Options of ``objective=reward``."""

    loss_type: str = field(default="bradley_terry", metadata={"live": ({}, {"loss_type": "eurus"})})
    """bradley_terry: the pair term; eurus: the absolute terms too, for pairs whose ``absolute`` flag is set."""
    margin: bool = True
    """Subtract the pair's margin inside the sigmoid where the data has one (LLaMA-2, TRL)."""
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"live": ({}, {"center_rewards_coefficient": 0.1})}
    )
    """Adds this times the mean of (r_c + r_r)^2 (TRL's name); default: no such term."""
    absolute_weight: float | None = field(
        default=None, metadata={"live": ({"loss_type": "eurus"}, {"loss_type": "eurus", "absolute_weight": 2.0})}
    )
    """eurus: weight of the absolute terms; default 1, the paper's."""
    pair_weight: float | None = field(
        default=None, metadata={"live": ({"loss_type": "eurus"}, {"loss_type": "eurus", "pair_weight": 0.0})}
    )
    """eurus: weight of the pair term of flagged pairs, 1 for the others; default 1. 0 is the paper's row without it."""

    def __post_init__(self) -> None:
        one_of("loss_type", self.loss_type, ("bradley_terry", "eurus"))
        for key in ("center_rewards_coefficient", "absolute_weight", "pair_weight"):
            if getattr(self, key) is not None:
                within(key, getattr(self, key), 0.0)


class Reward(BaseObjective):
    """``-log s(r_c - r_r)`` and, for the Eurus objective, ``-log s(r_c) - log s(-r_r)`` where the pair is flagged.

    ``s`` is the logistic function (arXiv 2404.02078, section 3).  BT fixes differences only; the absolute terms are
    cross-entropy with the reward as logit, they anchor zero.  The paper applies them to UltraInteract's pairs alone:
    ``data.absolute`` or a source's ``absolute`` sets the flag.  All terms divide by *all* pairs of the step.
    ``pair_weight=0`` takes the pair term from flagged pairs alone: the others have no other term to learn from, and the
    paper's Table 4 ("without L_BT") does not say what became of them.

    The reward is a bias-free linear head's output at the last token of the rendered row.  Pairs are weighted by
    ``weight``.  Statistics: TRL's names, and how often rewards have the right sign.
    """

    name = "reward"
    Config: type = RewardConfig
    units = (Unit.PAIR,)
    example = Unit.PAIR
    head = "scalar"

    @property
    def needs_flag(self) -> str | None:  # type: ignore[override]
        """The Eurus objective without a flagged pair is Bradley-Terry under another name."""
        return "absolute" if self.config.loss_type == "eurus" else None

    def absolute(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The absolute terms of each pair, [P], from its two rewards, [P] each."""
        return -logsigmoid(chosen) - logsigmoid(-rejected)

    def __call__(self, score: Score, batch: PackedBatch, context: StepContext) -> LossOutput:
        config = self.config
        rewards = score(batch, Ask("reward")).rewards
        assert rewards is not None
        chosen, rejected = rewards[batch.pairs].unbind(1)
        weights = pair_value(batch, "weight", rewards)
        logits = chosen - rejected
        if config.margin and "margin" in batch.pair_values:
            logits = logits - pair_value(batch, "margin", rewards)
        losses = -logsigmoid(logits)
        stats: dict[str, Any] = {}
        if config.loss_type == "eurus":
            flagged = pair_value(batch, "absolute", rewards)
            absolute = self.absolute(chosen, rejected)
            coefficient = 1.0 if config.absolute_weight is None else config.absolute_weight
            stats["loss/pair"] = stat(losses, weights)
            stats["loss/absolute"] = stat(absolute, weights * flagged)
            stats["absolute_share"] = stat(flagged, weights)
            if config.pair_weight is not None:
                losses = losses * (1 - flagged + config.pair_weight * flagged)
            losses = losses + coefficient * flagged * absolute
        if config.center_rewards_coefficient is not None:
            losses = losses + config.center_rewards_coefficient * (chosen + rejected) ** 2
        with torch.no_grad():
            stats |= {
                "accuracy": stat((chosen > rejected).to(rewards.dtype), weights),
                "margin": stat(chosen - rejected, weights),
                "mean_reward": stat((chosen + rejected) / 2, weights),
                "rewards/chosen": stat(chosen, weights),
                "rewards/rejected": stat(rejected, weights),
                "rewards/chosen_positive": stat((chosen > 0).to(rewards.dtype), weights),
                "rewards/rejected_negative": stat((rejected < 0).to(rewards.dtype), weights),
            }
        return LossOutput({Unit.PAIR: (weights * losses).sum()}, stats, (chosen - rejected).detach())
