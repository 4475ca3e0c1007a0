"""The learning rate as a function of the optimizer step: nothing to store, nothing to restore."""

from __future__ import annotations

import math

from alignlab.config import OptimConfig
from alignlab.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant")


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Number of warm-up steps; a ratio is rounded up, as the Hugging Face trainers do."""
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    return math.ceil(optim.warmup_ratio * total_steps)


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of step ``step`` (0-based) out of ``total_steps``.

    The definitions are those of the Hugging Face schedulers that the field's recipes name, step 0 of a warm-up
    (rate 0) included, so that a recipe's curve can be laid over theirs.
    """
    warmup = warmup_steps(optim, total_steps)
    if step < warmup:
        return optim.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    match optim.lr_scheduler_type:
        case "constant":
            return optim.learning_rate
        case "linear":
            return optim.learning_rate * max(0.0, 1.0 - progress)
        case "cosine":
            return optim.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ConfigError(f"optim.lr_scheduler_type: '{optim.lr_scheduler_type}' is none of {', '.join(SCHEDULES)}")
