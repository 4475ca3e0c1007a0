"""The first layers of a model as a folder of its own: the same code and shapes, for a fraction of the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from alignlab.config import ModelConfig
from alignlab.errors import ConfigError
from alignlab.models.load import load_model


def first_layers(config: ModelConfig, head: str, layers: int, seed: int, folder: Path) -> ModelConfig:
    """Write the first ``layers`` decoder layers of a model, with all the rest of it, to ``folder``; its configuration.

    Everything an objective, a template or a layout meets is the model's own, depth apart.  Raises ConfigError where the
    model has fewer layers, or keeps them otherwise than in one list.
    """
    loaded = load_model(config, head, torch.float32, seed)
    model = loaded.model
    text = model.config.get_text_config()
    total = getattr(text, "num_hidden_layers", 0)
    if not 1 <= layers <= total:
        raise ConfigError(f"layers: {layers} is not between 1 and the {total} that {config.name_or_path} has")
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(stacks) != 1:
        raise ConfigError(f"layers: {type(model).__name__} does not keep its layers in one list; leave the option out")
    del stacks[0][layers:]
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    own = config.tokenizer_name_or_path is None or loaded.tokenizer is not None
    return replace(
        config,
        name_or_path=str(folder),
        revision=None,
        tokenizer_name_or_path=None if own else config.tokenizer_name_or_path,
    )
