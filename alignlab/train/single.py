"""One optimizer step of an objective without an engine and without an update: how an objective is tried out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignlab.data.index import Index
from alignlab.data.loader import Loader
from alignlab.data.plan import StepPlans
from alignlab.metrics import Meter
from alignlab.train.step import accumulate, with_statistics
from alignlab.types import StepContext


class ScoreEngine:
    """As much of an engine as one step without an update needs; ``score`` answers the objective's questions."""

    dp, rank, device = 1, 0, torch.device("cpu")

    def __init__(self, score: Any) -> None:
        self.score = score

    def gather(self, values: Tensor) -> Tensor:
        return values

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()


def plans_of(index: Index, objective: Any, seed: int = 0, layout: str = "rows", **limits: Any) -> StepPlans:
    """Plans of one step that holds every example of ``index``."""
    return StepPlans(
        index, unit=objective.example, global_batch_size=index.example_count(objective.example), seed=seed,
        max_steps=1, layout=layout, mismatched=objective.mismatched, mixes_inputs=objective.mixes_inputs,
        **{"epochs": 1, "dp": 1, "token_budget": None, "max_examples": None, **limits},
    )  # fmt: skip


def run_step(score: Any, objective: Any, loader: Loader, plan: Any, context: StepContext, meter: Meter) -> Tensor:
    """The step's loss, statistics in ``meter``; in training gradients are left wherever ``score`` takes them."""
    engine = ScoreEngine(score)
    with torch.set_grad_enabled(context.training):
        context = with_statistics(engine, objective, loader, plan, context)
        return accumulate(engine, objective, loader, plan, context, meter, backward=context.training)
