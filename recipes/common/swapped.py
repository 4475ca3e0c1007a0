"""``dpo_swapped``, ``reward_swapped``: the rejected answers of the training pairs are taken for the chosen ones.

Wrong on purpose: a band of what held-out pairs show, which are as they should be, must notice.
"""

from __future__ import annotations

from typing import Any

from alignlab.objectives.dpo import DPO
from alignlab.objectives.reward import Reward
from alignlab.registry import register_objective
from alignlab.types import LossOutput, PackedBatch, Score, StepContext


class _Swapped:
    """The sides of every pair change places while the model trains."""

    def __call__(self, score: Score, batch: PackedBatch, context: StepContext) -> LossOutput:
        seen = batch._replace(pairs=batch.pairs.flip(1)) if context.training else batch
        loss: Any = super()
        found: LossOutput = loss.__call__(score, seen, context)
        return found


@register_objective
class SwappedDPO(_Swapped, DPO):
    """DPO on swapped pairs."""

    name = "dpo_swapped"


@register_objective
class SwappedReward(_Swapped, Reward):
    """A reward model on swapped pairs."""

    name = "reward_swapped"
