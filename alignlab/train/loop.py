"""The one optimizer loop.  Every objective runs here; none has a loop of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from alignlab.config import OptimConfig, TrainConfig
from alignlab.errors import NumericsError
from alignlab.metrics import Meter, finish
from alignlab.train.schedule import learning_rate, warmup_steps
from alignlab.train.step import Batches, accumulate, with_statistics
from alignlab.types import StepContext

SKIPS_IN_A_ROW = 5
"""With ``train.nonfinite=skip``: after so many skipped steps in a row the run stops all the same."""


@dataclass
class Progress:
    """All that a resumed run needs besides parameters and optimizer state; plain numbers, stored as JSON."""

    step: int = 0
    """optimizer steps done"""
    num_tokens: int = 0
    """input tokens seen so far, over all ranks"""
    skipped: int = 0
    skipped_in_a_row: int = 0
    objective_state: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What one step did.  ``metrics`` is filled at the end of a logging interval only (it costs a reduction)."""

    progress: Progress
    plan: Any
    metrics: dict[str, float] | None
    seconds: float


class Hooks(Protocol):
    """What happens around the steps: logging, evaluation, checkpoints, signals."""

    def after_step(self, report: StepReport) -> bool:
        """Called on every rank after every step; True ends the run at this boundary."""
        ...


def context_of(plans: Any, plan: Any, step: int, optim: OptimConfig, seed: int, progress: Progress) -> StepContext:
    """The context of one step, before its statistics."""
    return StepContext(
        step=step,
        total_steps=plans.total_steps,
        warmup_steps=warmup_steps(optim, plans.total_steps),
        seed=seed,
        totals=plan.totals,
        state=dict(progress.objective_state),
    )


def fit(
    engine: Any,
    objective: Any,
    plans: Any,
    batches: Batches,
    optim: OptimConfig,
    train: TrainConfig,
    seed: int,
    progress: Progress,
    hooks: Hooks,
    save_batch: Callable[[Any], None] = lambda plan: None,
) -> Progress:
    """Train from ``progress.step`` to the last step of ``plans``; returns the progress reached.

    Raises :class:`NumericsError` when a loss or gradient is not finite and ``train.nonfinite`` says stop; no rank
    has then updated its parameters.  ``save_batch`` keeps the offending step for inspection.
    """
    meter = Meter()
    interval_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    interval_steps = 0
    for step in range(progress.step, plans.total_steps):
        started = time.perf_counter()
        plan = plans.at(step)
        context = context_of(plans, plan, step, optim, seed, progress)
        context = with_statistics(engine, objective, batches, plan, context)
        of_step = Meter()
        loss = accumulate(engine, objective, batches, plan, context, of_step, backward=True)
        info = engine.step(learning_rate(optim, step, plans.total_steps))
        if info.updated:
            meter.merge(of_step)
            interval_loss += loss
            interval_steps += 1
            progress.skipped_in_a_row = 0
            if hasattr(objective, "end_of_step"):
                progress.objective_state = objective.end_of_step(context)
        else:
            save_batch(plan)
            _nonfinite(engine, train, step, loss, info.grad_norm, progress)
        progress.step = step + 1
        progress.num_tokens += plan.num_tokens
        metrics = None
        if progress.step % train.logging_steps == 0 or progress.step == plans.total_steps:
            # Skipped steps leave no trace in the means; an interval of nothing else has no loss to show.
            metrics = _reduced(engine, meter, interval_loss / interval_steps if interval_steps else loss)
            metrics |= {
                "grad_norm": info.grad_norm,
                "learning_rate": learning_rate(optim, step, plans.total_steps),
                "num_tokens": progress.num_tokens,
                "epoch": plan.epoch,
            }
            if progress.skipped:
                metrics["skipped_steps"] = progress.skipped
            meter.reset()
            interval_loss.zero_()
            interval_steps = 0
        if hooks.after_step(StepReport(progress, plan, metrics, time.perf_counter() - started)):
            break
    return progress


def _reduced(engine: Any, meter: Meter, loss: torch.Tensor) -> dict[str, float]:
    """One reduction for everything logged: the loss (a plain sum over ranks) and all statistics."""
    names = meter.names
    stacked = meter.stacked(names, engine.device)
    flat = engine.reduce(torch.cat((loss.reshape(1), stacked.reshape(-1))))
    return {"loss": flat[0].item(), **finish(names, flat[1:].reshape(-1, 2))}


def _nonfinite(engine: Any, train: TrainConfig, step: int, loss: torch.Tensor, norm: float, progress: Progress) -> None:
    """Apply the one numeric policy; the true value goes into the message."""
    value = engine.reduce(loss.reshape(1)).item()
    what = f"loss {value} and gradient norm {norm} at step {step + 1}"
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    if train.nonfinite == "stop":
        raise NumericsError(
            f"{what} are not finite; parameters are unchanged. Lower optim.learning_rate, look at the rows in "
            "nonfinite.json, or set train.nonfinite=skip"
        )
    if progress.skipped_in_a_row >= SKIPS_IN_A_ROW:
        raise NumericsError(f"{what}: {SKIPS_IN_A_ROW} steps in a row were not finite; parameters are unchanged")
