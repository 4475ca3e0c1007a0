"""Small random models and trees of token ids to try them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.types import EncodedSequence

VOCABULARY = 37


def tiny_llama(head: str = "lm", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_labels": 1,
            "initializer_range": 0.3, "pad_token_id": None, **options,
        }
    )  # fmt: skip
    made = (LlamaForCausalLM if head == "lm" else LlamaForSequenceClassification)(config)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made.eval()


@pytest.fixture
def llama() -> Callable[..., Any]:
    return tiny_llama


@pytest.fixture
def sequences() -> list[EncodedSequence]:
    """Siblings with a shared first target, a longer continuation of one of them, a row of its own."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCABULARY, 6)
    shared = rng.integers(0, VOCABULARY, 2)
    first = np.concatenate((prompt, shared, rng.integers(0, VOCABULARY, 3)))
    paths = [
        (first, 6),
        (np.concatenate((prompt, shared, rng.integers(0, VOCABULARY, 5))), 6),
        (np.concatenate((first, rng.integers(0, VOCABULARY, 4))), 11),
        (rng.integers(0, VOCABULARY, 7), 2),
    ]
    return [EncodedSequence(p.astype(np.int32), np.arange(len(p)) >= start) for p, start in paths]
