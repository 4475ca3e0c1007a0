"""Linear layers held in 4 bits (QLoRA, arXiv 2305.14314): NF4 with quantised scales, by bitsandbytes; GPU or CPU.

The base is frozen, so its packed weights only ever take part in forward passes and in the gradient of what comes before
them.  What is trained is therefore the adapter on the *rounded* base, and that is what is exported: the packed weights
are unpacked again and the adapter is merged into them, not into the weights that were loaded.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alignlab import dist
from alignlab.errors import ConfigError
from alignlab.mappings import temporary_entry

BLOCK, SCALES = 64, 256
"""Weights that share a scale, and scales that share one of their own: what bitsandbytes does when nothing is said."""
SCHEME = "quant_state.bitsandbytes__"
"""How the key of a packed weight's description goes on after ``<weight>.`` in a state dict."""


def bitsandbytes(wanted: str) -> Any:
    """The package; ConfigError naming ``wanted`` where it is not installed."""
    if not installed():
        raise ConfigError(f"{wanted} needs bitsandbytes: pip install 'alignlab[qlora]'")
    # With the package ``kernels``, bitsandbytes, imported on a CPU, downloads native code from the hub: hide it.
    with temporary_entry(sys.modules, "kernels", None):
        import bitsandbytes as package
    return package


def installed() -> bool:
    """Whether bitsandbytes can be imported."""
    return importlib.util.find_spec("bitsandbytes") is not None


def pack_linears(model: Any) -> Any:
    """Put every linear layer of ``model`` but its head into 4 bits, in place, on this rank's device; the model.

    Computes in the dtype of its input.  Raises ConfigError for float64 (bitsandbytes has no kernels for it) and for a
    model without such layers.
    """
    bnb = bitsandbytes("peft=qlora")
    if model.dtype == torch.float64:
        raise ConfigError("peft=qlora works in fp32 and bf16, not with model.dtype=fp64")
    for name, linear in packable(model):
        model.set_submodule(name, _packed(bnb, linear, dist.device()))
    model.is_loaded_in_4bit = True  # peft chooses its adapters' layers by it
    return model


def packable(model: Any) -> list[tuple[str, nn.Linear]]:
    """The linear layers that go into 4 bits, by name: all but the head; ConfigError where there are none."""
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    found = [
        (name, module) for name, module in model.named_modules() if type(module) is nn.Linear and module not in heads
    ]
    if not found:
        raise ConfigError(f"peft=qlora: {type(model).__name__} has no plain linear layers to put into 4 bits")
    return found


def packed_bytes(weights: int) -> int:
    """What so many weights of one layer take in 4 bits with their scales.

    Half a byte a weight; 8 bits for each 64 weights' scale; a float32 for each 256 of those scales; and for each layer
    the mean of its scales, the 16 values of NF4 and the 256 of the scales' own code, in float32.
    """
    scales = -(-weights // BLOCK)
    return -(-weights // 2) + scales + 4 * -(-scales // SCALES) + 4 * (1 + 16 + 256)


def _packed(bnb: Any, linear: nn.Linear, device: torch.device) -> nn.Module:
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.weight = weight.to(device)
    made.bias = linear.bias
    # In evaluation on a CPU it would repack its weights, in place, to a form that has no gradient.
    made.support_avx512bf16_for_cpu = False
    return made.train(linear.training)


def weights_in(parameter: Tensor) -> int:
    """How many weights a parameter stands for: a packed one holds two a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def unpacked(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict with its 4-bit weights in ``dtype``, as the layers computed with them, without their scales."""
    packed = [name.partition(f".{SCHEME}")[0] for name in weights if f".{SCHEME}" in name]
    if not packed:
        return dict(weights)
    functional = bitsandbytes("peft=qlora").functional
    plain = {name: value for name, value in weights.items() if not name.startswith(tuple(f"{p}." for p in packed))}
    for name in packed:
        parts = {key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, device=weights[name].device)
        plain[name] = functional.dequantize_4bit(weights[name], state).to(dtype)
    return plain
