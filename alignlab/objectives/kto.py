"""KTO: preference from unpaired answers that are marked desirable or not (arXiv 2402.01306)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignlab.errors import DataError
from alignlab.metrics import stat
from alignlab.objectives.base import BaseObjective, sequence_sums, sequence_value, within
from alignlab.types import Ask, LossOutput, PackedBatch, Score, StepContext


@dataclass
class KTOConfig:
    """Options of ``objective=kto``; names as in TRL's ``KTOConfig``."""

    beta: float = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: float = 1.0
    """lambda_D; Eurus: 1.33 at equal counts."""
    undesirable_weight: float = 1.0
    """lambda_U"""

    def __post_init__(self) -> None:
        within("beta", self.beta, 0.0, open_low=True)
        within("desirable_weight", self.desirable_weight, 0.0)
        within("undesirable_weight", self.undesirable_weight, 0.0)


class KTO(BaseObjective):
    """``lambda_D (1 - s(beta (d - z)))`` for desirable answers, ``lambda_U (1 - s(beta (z - d)))`` for the others.

    ``s`` is the logistic function, ``d = log pi(y|x) - log pi_ref(y|x)``, and ``z = max(0, mean of d)`` over the
    step's prompts with another row's answer (the mismatched rows of the step plan), without gradient (eq. 7 and 8).
    The unit is the sequence, whichever its label, as in TRL.  TRL takes z over one micro-batch (averaged over ranks);
    here it is over the whole optimizer step, so that it does not depend on how the step is cut.

    Rows are weighted by ``weight``, in z too.  Statistics: TRL's names.
    """

    name = "kto"
    Config: type = KTOConfig
    mismatched = True
    hints: ClassVar[dict[str, str]] = {
        "loss_type": "objective=kto has one loss; for pairs use objective=dpo objective.loss_type=kto_pair or apo_zero"
    }

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def wants_statistics(self) -> bool:
        return True

    def step_statistics(self, score: Score, batch: PackedBatch, context: StepContext) -> dict[str, Tensor]:
        """Log-ratio and weight of every mismatched row of the micro-batch, [S] each."""
        ratio, _ = self._ratio(score, batch)
        return {"kl": ratio, "weight": sequence_value(batch, "weight", ratio)}

    def __call__(self, score: Score, batch: PackedBatch, context: StepContext) -> LossOutput:
        config = self.config
        if "label" not in batch.sequence_values:
            raise DataError("objective kto needs rows with prompt, completion and label (true or false)")
        ratio, policy = self._ratio(score, batch)
        weights = sequence_value(batch, "weight", ratio)
        desirable = sequence_value(batch, "label", ratio)
        kl, kl_weights = context.statistics["kl"].double(), context.statistics["weight"].double()
        z = ((kl * kl_weights).sum() / kl_weights.sum()).clamp(min=0).to(ratio.dtype)
        rewards = config.beta * (ratio - z)
        losses = config.desirable_weight * desirable * torch.sigmoid(-rewards)
        losses = losses + config.undesirable_weight * (1 - desirable) * torch.sigmoid(rewards)
        stats = {"kl": stat(z)}
        for name, mask in (("chosen", weights * desirable), ("rejected", weights * (1 - desirable))):
            stats[f"rewards/{name}"] = stat(config.beta * ratio, mask)
            stats[f"logps/{name}"] = stat(policy, mask)
        return LossOutput({self.units[0]: (weights * losses).sum()}, stats)

    def _ratio(self, score: Score, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(log pi - log pi_ref, log pi), [S] each."""
        logps = score(batch, Ask("logps")).logps
        assert logps is not None
        policy = sequence_sums(logps[batch.seq_idx], batch)
        return policy - sequence_value(batch, "reference", policy), policy
