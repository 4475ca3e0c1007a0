"""``reward_swapped``: a reward model that takes the rejected answers of the training pairs for the chosen ones.

Wrong on purpose: a band of what the model ranks must notice.
"""

from __future__ import annotations

from alignlab.objectives.reward import Reward
from alignlab.registry import register_objective
from alignlab.types import LossOutput, PackedBatch, Score, StepContext


@register_objective
class SwappedReward(Reward):
    """The sides of every pair change places while the model trains."""

    name = "reward_swapped"

    def __call__(self, score: Score, batch: PackedBatch, context: StepContext) -> LossOutput:
        seen = batch._replace(pairs=batch.pairs.flip(1)) if context.training else batch
        return super().__call__(score, seen, context)
