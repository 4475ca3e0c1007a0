"""What the loop knows of an engine, and how one is chosen.

An engine owns parameters in training: the forward call, gradients, the optimizer, their copies over ranks and their
state on disk.  It does no averaging beyond ZeRO's mean over ranks: the loss that reaches :meth:`Engine.backward` is a
sum divided by the whole step's count and multiplied by ``engine.dp``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignlab import dist
from alignlab.config import EngineConfig, OptimConfig
from alignlab.engine import shards
from alignlab.errors import ConfigError
from alignlab.types import Ask, PackedBatch, Scores, StepInfo

NAMES = ("auto", "local", "zero0", "zero1", "zero2", "zero3")


class Engine(Protocol):
    """The one interface between the loop and whatever holds the parameters."""

    name: str
    dp: int
    """Data-parallel ranks: micro-batch counts are multiples of it, losses are multiplied by it."""
    rank: int
    device: torch.device
    module: nn.Module
    """The scorer, as it was given (in ZeRO-3 its parameters are partitioned)."""
    updates: int
    """Optimizer updates done since the first step of the run."""

    def score(self, batch: PackedBatch, ask: Ask) -> Scores:
        """One forward pass.  Honours ``torch.no_grad()`` and the module's train/eval mode.

        Under ZeRO-3 it is a collective: every rank must call it equally often.
        """
        ...

    def backward(self, loss: Tensor, last: bool = False) -> None:
        """Add this micro-batch's gradient; ``last`` marks the step's last one.  ``loss`` is a scalar, see above."""
        ...

    def step(self, lr: float) -> StepInfo:
        """Clip by the global norm, update, and clear gradients.  A norm that is not finite updates nothing."""
        ...

    def zero(self) -> None:
        """Throw the gradients of an unfinished step away."""
        ...

    def train(self, mode: bool = True) -> None:
        """The module's train or eval mode (dropout, activation checkpointing)."""
        ...

    def state_bytes(self) -> int:
        """How many bytes :meth:`save` writes on this rank, but for a few kilobytes."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the training state below ``folder``, which exists.  Every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what any engine at any number of ranks saved; bit-identical in the same setting."""
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer under its name in ``module.state_dict()``, complete, on the host.

        In the module's dtype; tied weights under each of their names.  Collective; empty on ranks other than 0.
        """
        ...

    def gradient_norms(self) -> dict[str, float]:
        """2-norm of each trainable parameter's gradient, before clipping.  Collective.

        Called instead of ``step``, after the last ``backward``: the gradients are thrown away, nothing is updated.
        """
        ...

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in a new tensor."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """1-D values of every rank, concatenated in rank order; lengths may differ."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def close(self) -> None:
        """Free what the engine holds.  The process group stays."""
        ...


class Collectives:
    """The collectives that engines share.  ``reduce`` and ``gather`` answer on the engine's device."""

    dp: int
    device: torch.device

    def reduce(self, tensor: Tensor) -> Tensor:
        out = tensor.to(self.device, copy=True)
        if self.dp > 1:
            torch.distributed.all_reduce(out)
        return out

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat(dist.gather_ragged(values.to(self.device)))

    def barrier(self) -> None:
        dist.barrier()


def resolve_name(name: str, ranks: int | None = None) -> str:
    """``engine=auto`` is ``local`` for one process and ``zero2`` for more; ``ranks`` defaults to those there are."""
    if name not in NAMES:
        raise ConfigError(f"unknown engine '{name}'. Known: {', '.join(NAMES)}")
    if name == "auto":
        return "local" if (ranks or dist.world_size()) == 1 else "zero2"
    return name


def check(name: str, optim: OptimConfig, config: EngineConfig, dtype: torch.dtype, ranks: int) -> None:
    """Refuse combinations that would not run or would train something else; one line says what to do.

    ``name`` is resolved.  Needs no process group, so the launcher can call it before starting workers.
    """
    if name == "local" and ranks > 1:
        raise ConfigError(f"engine=local is for one process, there are {ranks}; use engine=zero0 .. zero3")
    if name != "local" and dtype == torch.float64:
        raise ConfigError(f"model.dtype=fp64 needs engine=local, not {name}")
    if name == "zero0" and dtype == torch.bfloat16:
        # DeepSpeed's wrapper runs one dummy step when it is made, so Adam's counter starts at 1.
        raise ConfigError("engine=zero0 with model.dtype=bf16 trains another optimizer in DeepSpeed; use engine=zero1")
    if config.offload_optimizer and name not in ("zero1", "zero2", "zero3"):
        raise ConfigError(f"engine.offload_optimizer needs engine=zero1, zero2 or zero3, not {name}")
    if optim.name == "adamw_8bit" and name not in ("local", "zero0"):
        raise ConfigError(f"optim=adamw_8bit works with engine=local and zero0, not {name}: ZeRO cuts its blocks apart")


def make_engine(
    name: str,
    module: nn.Module,
    optim: OptimConfig,
    engine: EngineConfig,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
) -> Engine:
    """Hand ``module`` (called as ``module(batch, ask)``) to an engine, which casts and moves it in place.

    Forms the process group where the engine needs one.  ``dtype`` bf16 means bfloat16 parameters with float32 master
    weights and float32 gradient accumulation.  Raises :class:`ConfigError` for what cannot work.
    """
    name = resolve_name(name)
    device = dist.device()
    check(name, optim, engine, dtype, dist.world_size())
    dist.init(timeout=engine.timeout, group=name != "local")
    if gradient_checkpointing:
        enable_checkpointing(module)
    cast_parameters(module, dtype)
    if name == "local":
        from alignlab.engine.local import LocalEngine

        return LocalEngine(module, optim, device)
    from alignlab.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, optim, engine, stage=int(name[-1]), dtype=dtype, device=device)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters, and leave buffers alone: rotary frequencies in bfloat16 are other positions."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def enable_checkpointing(module: nn.Module) -> None:
    """Recompute activations in the backward pass, in every Hugging Face model inside ``module``."""
    found = False
    for child in module.modules():
        if hasattr(child, "gradient_checkpointing_enable") and getattr(child, "supports_gradient_checkpointing", False):
            enable: Any = child.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            found = True
            break  # it reaches its own children
    if not found:
        raise ConfigError("train.gradient_checkpointing=true: this model does not support it")


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained, tied ones once."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def frozen_hash(module: nn.Module) -> str | None:
    """SHA-256 over the parameters that are not trained; None where there are none.

    Checkpoints leave them out, so this is what ties a checkpoint to its base model.
    """
    digest, found = hashlib.sha256(), False
    for name, p in sorted(module.named_parameters()):
        if not p.requires_grad:
            digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            found = True
    return digest.hexdigest() if found else None


def check_state(state: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    """Refuse to load what belongs to another model, optimizer or precision; the differing field is named."""
    file = folder / shards.STATE_FILE
    for key in ("dtype", "optimizer", "frozen"):
        if state.get(key) != mine[key]:
            raise ConfigError(
                f"{file}: its {key} is {state.get(key)}, this run's is {mine[key]}; it cannot go on from it"
            )
    theirs, ours = state.get("shapes", {}), mine["shapes"]
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"{file}: parameter {name} is trained there with shape {theirs.get(name)}, here with {ours.get(name)}; "
                "it is another model's"
            )
