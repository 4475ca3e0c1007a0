"""Shadow objectives: what losses that do not train say of the policy, on fixed pairs, at every evaluation of a run.

Each is the registry's own objective, evaluated as ``alignlab evaluate objective=NAME`` would on the same rows with the
initial policy as reference.  Those that eat the same rows share one forward pass: the log-probabilities of a
micro-batch are computed for the first and remembered for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from alignlab.data.loader import Loader
from alignlab.train.evaluation import evaluate
from alignlab.types import Ask, PackedBatch, Score, Scores, StepContext

STATISTICS = {
    "rewards/margins": "margin", "rewards/accuracies": "accuracy", "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
}  # fmt: skip
"""Statistics of an objective that are kept beside its loss, and what they end in: ``shadow/dpo_margin``."""


@dataclass(frozen=True)
class Shadow:
    """Objectives that eat the same rows in the same layout: by the names they are logged under, with those rows."""

    objectives: Mapping[str, Any]
    plans: Any
    """one step that holds every example"""
    loader: Loader


class Remembered:
    """A ``score`` that computes the plain log-probabilities of each micro-batch in the first pass over it alone.

    For repeated passes over one plan under one set of weights, with :meth:`end_of_pass` after each; what else is asked
    (mixed inputs, tokens) goes through.  A micro-batch is known by its sequences, and a filler, which repeats one,
    apart from it.  Within a pass nothing is answered from memory: what one rank finds there another might have to
    compute, and ranks that shard their weights compute together or hang.
    """

    def __init__(self, score: Score) -> None:
        self._score = score
        self._known: dict[tuple[float, tuple[int, ...]], Tensor] = {}
        self._new: dict[tuple[float, tuple[int, ...]], Tensor] = {}

    def __call__(self, batch: PackedBatch, ask: Ask) -> Scores:
        if ask != Ask("logps") or "partner" in batch.sequence_values:
            return self._score(batch, ask)
        key = (batch.weight, tuple(batch.sequence_ids.tolist()))
        if key in self._known:
            return Scores(logps=self._known[key])
        scores = self._score(batch, ask)
        assert scores.logps is not None
        self._new[key] = scores.logps
        return scores

    def end_of_pass(self) -> None:
        """What was computed since the last call is remembered from now on."""
        self._known |= self._new
        self._new = {}


def evaluate_shadows(engine: Any, shadows: Iterable[Shadow], context: StepContext) -> dict[str, float]:
    """``{"shadow/<name>": loss, "shadow/<name>_<statistic>": ...}`` under the weights as they are.  Collective.

    ``context`` is the training step's; the running objective's memory between steps is kept from the shadows.
    """
    context = replace(context, state={})
    found: dict[str, float] = {}
    for shadow in shadows:
        score = Remembered(engine.score)
        for name, objective in shadow.objectives.items():
            values = evaluate(engine, objective, shadow.plans, shadow.loader, context, score)
            score.end_of_pass()
            found[f"shadow/{name}"] = values["eval_loss"]
            for statistic, ending in STATISTICS.items():
                if f"eval_{statistic}" in values:
                    found[f"shadow/{name}_{ending}"] = values[f"eval_{statistic}"]
    return found
