"""Optimizers and the gradient norm, the same for every engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from alignlab.config import OptimConfig
from alignlab.errors import ConfigError

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
    correction is a running product that a load recomputes by a power.
    """
    groups = list(groups)
    if config.name == "adamw":
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps)
    if config.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.learning_rate, alpha=config.alpha, eps=config.eps)
    if config.name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ConfigError("optim=adamw_8bit needs bitsandbytes: pip install 'alignlab[qlora]'") from None
        betas = (config.beta1, config.beta2)
        return AdamW8bit(groups, lr=config.learning_rate, betas=betas, eps=config.eps)
    raise ConfigError(f"unknown optimizer '{config.name}'. Known: {', '.join(KNOWN)}")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_(gradients: Sequence[Tensor], max_norm: float) -> float:
    """Scale ``gradients`` in place to a global 2-norm of at most ``max_norm`` (0: leave them); the norm before that.

    Gradients are float32 or float64.  A norm that is not finite leaves them untouched: the caller must not step.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    value = norm.item()
    if max_norm > 0 and value > max_norm - 1e-6 and value < float("inf"):
        torch._foreach_mul_(list(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return value
