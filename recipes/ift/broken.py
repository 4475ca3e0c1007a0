"""``ift_shifted``: IFT as it is when the first pass's predictions are used without the shift by one.

The residual token of a place is then the one predicted for the place behind it, and the second pass reads what it is to
predict.  Wrong on purpose: the recipe's band of the mixed loss must notice.
"""

from __future__ import annotations

from torch import Tensor

from alignlab.objectives.ift import IFT
from alignlab.registry import register_objective
from alignlab.types import Mix, PackedBatch, Score, StepContext


@register_objective
class ShiftedIFT(IFT):
    """IFT with the residual tokens one place too early."""

    name = "ift_shifted"

    def _mix(self, score: Score, batch: PackedBatch, context: StepContext, strength: float) -> Mix | None:
        mix = super()._mix(score, batch, context, strength)
        return None if mix is None else mix._replace(residual=one_place_early(mix.residual, batch))


def one_place_early(tokens: Tensor, batch: PackedBatch) -> Tensor:
    """[N]: each scored place with the token of the place behind it on its sequence's path; the last keeps its own."""
    shifted = tokens.clone()
    here, behind = batch.seq_idx[:-1], batch.seq_idx[1:]
    inside = batch.seq_of[:-1] == batch.seq_of[1:]
    shifted[here[inside]] = tokens[behind[inside]]
    return shifted
