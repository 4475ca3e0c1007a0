"""Supervised fine-tuning: the negative log-likelihood of the target tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from alignlab.metrics import stat
from alignlab.objectives.base import BaseObjective, num_targets, one_of, sequence_sums, sequence_value
from alignlab.types import Ask, LossOutput, PackedBatch, Score, StepContext, Unit


@dataclass
class SFTConfig:
    """Options of ``objective=sft``."""

    unit: str = field(default="token", metadata={"live": ({}, {"unit": "sequence"})})
    """token: every target token of the optimizer step counts the same (what TRL does over one batch); sequence: the
    mean over each sequence first, then over sequences (the papers' baselines, e.g. IFT's code)."""

    def __post_init__(self) -> None:
        one_of("unit", self.unit, ("token", "sequence"))


class SFT(BaseObjective):
    """``-log p(y_t | x, y_<t)`` over all target tokens: every assistant turn, terminators included.

    A token that several sequences of a tree share counts once for each of them.  Sequences are weighted by their
    ``weight``; the loop divides by the sum of weights of the unit.  Statistics: ``loss/token`` and ``loss/sequence``,
    the loss under both units whichever is trained.
    """

    name = "sft"
    Config: type = SFTConfig

    def __init__(self, config: SFTConfig | None = None) -> None:
        super().__init__(config)
        self.units = (Unit(self.config.unit),)

    def __call__(self, score: Score, batch: PackedBatch, context: StepContext) -> LossOutput:
        logps = score(batch, Ask("logps")).logps
        assert logps is not None
        sums = -sequence_sums(logps[batch.seq_idx], batch)
        weights = sequence_value(batch, "weight", sums)
        counts = num_targets(batch, sums)
        means = sums / counts
        total = (weights * (sums if self.units == (Unit.TOKEN,) else means)).sum()
        stats = {"loss/token": stat(means, weights * counts), "loss/sequence": stat(means, weights)}
        return LossOutput({self.units[0]: total}, stats)
