"""A model without its weights: modules, shapes and dtypes on the meta device, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignlab.config import ModelConfig, PeftConfig
from alignlab.models import fourbit
from alignlab.models.adapters import apply_peft
from alignlab.models.head import ScalarHead
from alignlab.models.source import has_stored_head, shape


class Skeleton(NamedTuple):
    """A module whose parameters are on the meta device, and what those take that are held in 4 bits."""

    module: Any
    packed: Mapping[Tensor, int]
    """bytes, scales included"""


def skeleton(config: ModelConfig, head: str, dtype: torch.dtype) -> Any:
    """The model that ``load_model`` would give, on the meta device; no weight file is opened.

    Raises ConfigError for a name whose configuration cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    hf = shape(config)
    stored_head = has_stored_head(hf, head, config.name_or_path)
    if head == "scalar" and not stored_head:
        hf.num_labels = 1
    kind: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = kind.from_config(hf, dtype=dtype, trust_remote_code=config.trust_remote_code)
        model.tie_weights()
        if head == "scalar":
            model.score = ScalarHead(model.score.in_features, 1, bias=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.use_cache = False
    return model


def with_adapters(model: Any, config: PeftConfig, head: str) -> Skeleton:
    """``model``, a :func:`skeleton`, as it trains: inside a peft model where ``config`` asks for one.

    A base in 4 bits keeps its layers as they are here, since bitsandbytes has none without weights.
    """
    packed: dict[Tensor, int] = {}
    if config.name == "qlora":
        packed = {linear.weight: fourbit.packed_bytes(linear.weight.numel()) for _, linear in fourbit.packable(model)}
    dtype = model.dtype
    with torch.device("meta"):
        plain = replace(config, name="lora") if config.name == "qlora" else config
        module = apply_peft(model, plain, head, 0)
    for parameter in module.parameters():  # adapters are made in float32, and the engines cast them
        parameter.data = parameter.data.to(dtype)
    return Skeleton(module, packed)
