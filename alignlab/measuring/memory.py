"""How many bytes the states of a model take on one rank: what the engines allocate, counted from shapes.

The states are those that stand between two micro-batches of a step, from the second step on: parameters, float32 master
weights, gradients and the optimizer's moments; and DeepSpeed's buffers, some of which ZeRO-2 has during a backward pass
only.  Activations, which come on top, are not counted, nor is what lives for a moment while gradients are clipped and
parameters updated: a second copy of a rank's gradients, when no activation is left.

The rules are those of the engines' own code and of DeepSpeed's, read and measured; ``tests/distributed/test_memory.py``
holds them to real tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.config import OptimConfig
from alignlab.engine import deepspeed
from alignlab.engine.optim import parameter_groups

FLOAT = 4
"""Bytes of a float32: master weights, accumulated gradients, moments."""
LIVE = 1_000_000_000
"""ZeRO-3 keeps at most so many gathered parameters (DeepSpeed's ``stage3_max_live_parameters``)."""
BLOCK, SMALLEST, CODES = 256, 4096, 2 * 256
"""AdamW in 8 bits: moments that share a scale, parameters from which on it has 8 bits, values of its two codes."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank by part, on its device and on its host."""

    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    gathered: int = 0
    """ZeRO-3: at most so many bytes more of gathered parameters while a layer computes"""


def model_states(
    module: nn.Module, packed: Mapping[Tensor, int], engine: str, ranks: int, dtype: torch.dtype,
    optim: OptimConfig, offload: bool = False,
) -> ModelStates:  # fmt: skip
    """The states of ``module`` in ``engine`` (resolved) at so many ranks.

    ``packed`` are the bytes of parameters held in 4 bits.  The module's own dtypes do not matter, ``dtype`` is what the
    engine casts to; it may be on the meta device.
    """
    groups = [list(group["params"]) for group in parameter_groups(module, optim.weight_decay)]  # type: ignore[call-overload]
    sizes = {p: packed.get(p, p.numel() * dtype.itemsize) for p in module.parameters()}
    if engine in ("local", "zero0"):
        return _whole(groups, sizes, dtype, optim)
    elements = sum((p.numel() + 1) // 2 if p in packed else p.numel() for p in sizes)
    config = deepspeed.deepspeed_config(int(engine[-1]), dtype, optim, offload, ranks, elements)
    bucket = int(config["zero_optimization"]["reduce_bucket_size"])
    if engine == "zero3":
        return _sharded(groups, list(sizes), ranks, dtype, optim, bucket, offload)
    return _partitioned(int(engine[-1]), groups, sizes, ranks, dtype, optim, bucket, offload)


def _whole(
    groups: Sequence[Sequence[nn.Parameter]], sizes: Mapping[nn.Parameter, int], dtype: torch.dtype, optim: OptimConfig
) -> ModelStates:
    """The plain engine, and DeepSpeed without ZeRO: every rank has everything."""
    high = max(FLOAT, dtype.itemsize)
    numels = [p.numel() for group in groups for p in group]
    return ModelStates({
        "parameters": sum(sizes.values()),
        "master weights": high * sum(numels) if dtype.itemsize < FLOAT else 0,
        "gradients": high * sum(numels),
        "optimizer": _moments(optim, numels, high),
    })  # fmt: skip


def _partitioned(
    stage: int, groups: Sequence[Sequence[nn.Parameter]], sizes: Mapping[nn.Parameter, int], ranks: int,
    dtype: torch.dtype, optim: OptimConfig, bucket: int, offload: bool,
) -> ModelStates:  # fmt: skip
    """ZeRO-1 and 2: each group of parameters lies flat, and a rank updates one part of it.

    Master weights are a copy in float32 too.  ZeRO-1 keeps the whole gradient, in bfloat16 beside its float32 sum (but
    with offload, where another of DeepSpeed's optimizers serves); ZeRO-2 keeps, in float32, the gradients of all
    parameters that have an element in this rank's part.
    """
    low, item = dtype.itemsize < FLOAT, dtype.itemsize
    numels = [[p.numel() for p in group] for group in groups]
    whole = [2 * ranks * math.ceil(sum(group) / (2 * ranks)) for group in numels]  # parts begin at multiples of 4 bytes
    parts = [size // ranks for size in whole]
    part, trained = sum(parts), sum(sum(group) for group in numels)
    largest = max(max(group) for group in numels)
    frozen = sum(sizes.values()) - item * trained
    touched = max(
        sum(_touched(group, rank * part, part) for group, part in zip(numels, parts, strict=True))
        for rank in range(ranks)
    )
    moments = _moments(optim, parts, FLOAT)
    device = {"parameters": frozen + item * sum(whole)}
    host: dict[str, int] = {}
    place = host if offload else device
    place |= {"master weights": FLOAT * part, "optimizer": moments}
    if stage == 1:
        device["gradients"] = FLOAT * trained
        if low and not offload:
            device["gradients"] = FLOAT * sum(whole) + item * trained
        buffers = 0 if low and not offload else FLOAT * bucket
    else:
        device["gradients"] = FLOAT * (part if low else 0 if offload else touched)
        buffers = item * bucket
    if offload:
        host["gradients"] = FLOAT * part + (FLOAT * touched if stage == 2 and not low else 0)
        host["buffers"] = item * (part + largest)
        buffers += item * largest
    device["buffers"] = buffers
    return ModelStates(_ordered(device), _ordered(host))


def _touched(numels: Sequence[int], begin: int, length: int) -> int:
    """Elements of the parameters that lie, in part at least, in ``[begin, begin + length)`` of their flat group."""
    found, place = 0, 0
    for numel in numels:
        if place < begin + length and place + numel > begin:
            found += numel
        place += numel
    return found


def _sharded(
    groups: Sequence[Sequence[nn.Parameter]], parameters: Sequence[nn.Parameter], ranks: int, dtype: torch.dtype,
    optim: OptimConfig, bucket: int, offload: bool,
) -> ModelStates:  # fmt: skip
    """ZeRO-3: each parameter, frozen ones too, is cut over the ranks; small ones are whole on every rank besides.

    Master weights are a copy in float32 too.
    """
    item = dtype.itemsize
    parts = [sum(math.ceil(p.numel() / ranks) for p in group) for group in groups]
    part = sum(parts)
    kept = [p.numel() for p in parameters if p.numel() <= deepspeed.PERSISTENCE]
    held = sum(math.ceil(p.numel() / ranks) for p in parameters) + sum(ranks * math.ceil(n / ranks) for n in kept)
    place = {
        "master weights": FLOAT * part,
        "gradients": FLOAT * part * (2 if offload else 1),
        "optimizer": _moments(optim, parts, FLOAT),
    }
    device = {"parameters": item * held, "buffers": FLOAT * bucket}
    gathered = item * min(LIVE, sum(p.numel() for p in parameters) - sum(kept))
    return ModelStates(_ordered(device if offload else device | place), place if offload else {}, gathered)


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
    names = ("parameters", "master weights", "gradients", "optimizer", "buffers")
    return {name: parts[name] for name in names if name in parts}


def _moments(optim: OptimConfig, numels: Sequence[int], high: int) -> int:
    """Bytes of an optimizer's state of tensors with so many elements of ``high`` bytes each.

    Torch's count their updates in a float32 for each tensor; bitsandbytes' have 8 bits a moment and a float32 for each
    256 of them, but for small tensors, and share their codes.
    """
    if optim.name == "rmsprop":
        return sum(high * n + FLOAT for n in numels)
    if optim.name == "adamw":
        return sum(2 * high * n + FLOAT for n in numels)
    large = [n for n in numels if n >= SMALLEST]
    small = sum(2 * FLOAT * n for n in numels if n < SMALLEST)
    return small + sum(2 * (n + FLOAT * math.ceil(n / BLOCK)) for n in large) + FLOAT * CODES * bool(large)


def gib(states: Mapping[str, int]) -> dict[str, Any]:
    """The same in GiB, with their ``total``."""
    return {name: size / 2**30 for name, size in {**states, "total": sum(states.values())}.items()}
