"""Small models in the place of large ones: of the right family, loadable, and fit for every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config import ModelConfig
from alignlab.models.load import load_model
from alignlab.models.proof import choose_layout
from alignlab.models.standin import family_of, write_standin

FAMILIES = {
    "mistralai/Mistral-7B-v0.1": "mistral",
    "HuggingFaceH4/mistral-7b-sft-beta": "mistral",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
    "meta-llama/Llama-2-13b-hf": "llama",
    "Qwen/Qwen3-8B": "qwen3",
    "google/gemma-2b": "gemma",  # a size, not Gemma 2
    "google/gemma-2-2b": "gemma2",
    "openbmb/Eurus-7b-sft": None,
}


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_the_family_is_read_from_the_name(name: str, family: str | None) -> None:
    assert family_of(name) == family


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        # Wide enough for the float32 of Gemma's norms to show in a proof in float64.
        ("google/gemma-2b", "gemma", "a small gemma in the place of google/gemma-2b"),
        ("someone/unheard-of-7b", "llama", "a small llama in the place of someone/unheard-of-7b"),
        ("tiny", "llama", "tiny"),
    ],
)
def test_it_loads_and_every_layout_is_exact(name: str, kind: str, said: str, tmp_path: Path) -> None:
    assert write_standin(ModelConfig(name), tmp_path / "model").startswith(said)
    loaded = load_model(ModelConfig(str(tmp_path / "model")), "lm", torch.float32, 0)
    assert loaded.model.config.model_type == kind
    assert loaded.tokenizer.chat_template
    assert sum(p.numel() for p in loaded.model.parameters()) < 2e7
    assert choose_layout(loaded.model, "tree")[0] == "tree"


def test_a_folder_at_hand_gives_its_own_shape(tmp_path: Path, llama: Any) -> None:
    model = llama(dtype=torch.float32, num_hidden_layers=5, rope_theta=77.0, head_dim=8)
    model.save_pretrained(tmp_path / "large")
    said = write_standin(ModelConfig(str(tmp_path / "large")), tmp_path / "small")
    assert said == f"one layer a kind of {tmp_path / 'large'}"
    config = load_model(ModelConfig(str(tmp_path / "small")), "lm", torch.float32, 0).model.config
    assert config.num_hidden_layers == 1
    assert config.head_dim == 8
    assert config.rope_parameters["rope_theta"] == 77.0
