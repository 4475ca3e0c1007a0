"""Optimizers and the gradient norm, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.config import OptimConfig
from alignlab.errors import ConfigError
from alignlab.models.fourbit import bitsandbytes

LARGEST_NORM = 1e19
"""A global gradient norm from here on counts as infinite, see :func:`usable`."""
KNOWN = ("adamw", "rmsprop", "adamw_8bit")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters: matrices decay, vectors (biases, norms) do not, as in Hugging Face's Trainer.

    One group where nothing decays, so that ZeRO has one flat partition.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter of the model is trainable")
    if not weight_decay:
        return [{"params": trainable, "weight_decay": 0.0}]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: Iterable[dict[str, object]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over ``groups``.

    Torch's own AdamW everywhere: DeepSpeed's CPU and fused Adam resume with other last bits, because their bias
    correction is a running product that a load recomputes by a power.  Torch's fused kernel computes that power too,
    and reads and writes every number once: an update costs a seventh of the plain one's time on a CPU.
    """
    groups, options = list(groups), optimizer_options(config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, **options)
    optimizer: torch.optim.Optimizer = bitsandbytes("optim=adamw_8bit").optim.AdamW8bit(groups, **options)
    return optimizer


def optimizer_options(config: OptimConfig) -> dict[str, Any]:
    """What the optimizer of ``config`` is made with: all that it reads, and nothing else."""
    match config.name:
        case "adamw" | "adamw_8bit":
            return {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
        case "rmsprop":
            return {"lr": config.learning_rate, "alpha": config.alpha, "eps": config.eps}
    raise ConfigError(f"unknown optimizer '{config.name}'. Known: {', '.join(KNOWN)}")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def usable(norm: float) -> bool:
    """Whether a gradient of this global norm may update parameters: it is finite, and so is its float32 square.

    Some engines sum squares in float32 and some in float64; beyond the limit the former see infinity.  All refuse.
    """
    return norm < LARGEST_NORM


def logged_norm(norm: float) -> float:
    """The norm as every engine reports it: infinity where it is not :func:`usable` for being too large."""
    return math.inf if norm >= LARGEST_NORM else norm


def clip_(gradients: Sequence[Tensor], max_norm: float) -> float:
    """Scale ``gradients`` in place to a global 2-norm of at most ``max_norm`` (0: leave them); the norm before that.

    Gradients are float32 or float64.  A norm that is not :func:`usable` leaves them as they are: do not step then.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    value = norm.item()
    if max_norm > 0 and value > max_norm - 1e-6 and usable(value):
        torch._foreach_mul_(list(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return value
