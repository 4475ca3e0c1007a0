"""A small random model in the place of a large one: of its configuration where that is at hand, else of its family."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from alignlab.config import ModelConfig
from alignlab.models import tiny
from alignlab.models.proof import small_copy
from alignlab.models.source import configuration

FALLBACK = "llama"
"""The family that stands in where a name tells none."""


def write_standin(config: ModelConfig, folder: Path) -> str:
    """Write a model of one layer a kind, with the tokenizer of ``tiny``, to ``folder``; a few words on what it is.

    It computes as the model of ``config`` does (attention, norms, activations); the widths, the number of layers, the
    words and the weights are not that model's.  Opens no connection.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.name_or_path == "tiny":
        model, tokenizer = tiny.load(0)
        said = "tiny"
    else:
        tokenizer = tiny.tokenizer()
        shape = configuration(replace(config, trust_remote_code=False))
        if shape is not None:
            said = f"one layer a kind of {config.name_or_path}"
        else:
            family = family_of(config.name_or_path)
            shape = AutoConfig.for_model(family or FALLBACK)
            said = f"a small {family or FALLBACK} in the place of {config.name_or_path}, which is not on this machine"
        with torch.device("meta"):
            large = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
        model = small_copy(large, vocabulary=len(tokenizer)).to(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return said


def family_of(name: str) -> str | None:
    """The model type that a hub name speaks of: the longest one in its last part (``Mistral-7B-v0.1``: mistral).

    Sizes are left out before: ``gemma-2b`` is no Gemma 2.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def letters(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    said = letters(re.sub(r"(?i)(?<![a-z0-9])\d+(\.\d+)?[bm](?![a-z0-9])", "", name.rpartition("/")[2]))
    found = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if len(letters(kind)) > 3 and letters(kind) in said]
    return max(found, key=lambda kind: len(letters(kind)), default=None)
