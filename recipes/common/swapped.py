"""``dpo_swapped``: DPO that takes the rejected answers of the training pairs for the chosen ones.

Wrong on purpose: a band of what preferences change on the held-out pairs, which are as they should be, must notice.
"""

from __future__ import annotations

from alignlab.objectives.dpo import DPO
from alignlab.registry import register_objective
from alignlab.types import LossOutput, PackedBatch, Score, StepContext


@register_objective
class SwappedDPO(DPO):
    """The sides of every pair change places while the model trains."""

    name = "dpo_swapped"

    def __call__(self, score: Score, batch: PackedBatch, context: StepContext) -> LossOutput:
        seen = batch._replace(pairs=batch.pairs.flip(1)) if context.training else batch
        return super().__call__(score, seen, context)
