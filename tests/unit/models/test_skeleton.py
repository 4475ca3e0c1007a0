"""A model on the meta device is the one that would be loaded, without a byte of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config import ModelConfig, PeftConfig
from alignlab.errors import ConfigError
from alignlab.models.adapters import apply_peft
from alignlab.models.flops import ModelFlops
from alignlab.models.load import load_model
from alignlab.models.proof import choose_layout
from alignlab.models.skeleton import skeleton, with_adapters

TINY = ModelConfig("tiny")


def shapes(model: Any) -> dict[str, Any]:
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_shapes_are_those_of_the_loaded_model(head: str, peft: str) -> None:
    config = PeftConfig(peft, lora_r=2)
    loaded = load_model(TINY, head, torch.float32, 0).model
    base = skeleton(TINY, head, torch.float32)
    assert shapes(base) == shapes(loaded)
    assert choose_layout(base, "auto") == choose_layout(loaded, "auto")
    made, real = with_adapters(base, config, head), apply_peft(loaded, config, head, 0)
    assert shapes(made.module) == shapes(real)
    assert all(p.is_meta for p in made.module.parameters())
    assert ModelFlops.of(made.module) == ModelFlops.of(real)


def test_bfloat16_reaches_adapters_too() -> None:
    """What peft makes in float32 is cast by the engine, and so here."""
    made = with_adapters(skeleton(TINY, "lm", torch.bfloat16), PeftConfig("lora"), "lm")
    assert {p.dtype for p in made.module.parameters()} == {torch.bfloat16}


def test_in_four_bits_every_layer_but_the_head_counts() -> None:
    """``tiny``: 7 matrices in each of 2 layers.  192 x 192 weights are 18,432 bytes and 576 scales of a byte each.

    The scales share 3 of their own; beside them 1 mean, 16 + 256 codes, in float32.
    """
    made = with_adapters(skeleton(TINY, "lm", torch.bfloat16), PeftConfig("qlora"), "lm")
    assert len(made.packed) == 14
    assert min(made.packed.values()) == 18_432 + 576 + 4 * (3 + 1 + 16 + 256)
    assert not any(p.requires_grad for p in made.packed)


def test_no_weight_file_is_opened(tmp_path: Path) -> None:
    """Weights that nobody could read do not matter; a folder that is no model does."""
    load_model(TINY, "lm", torch.float32, 0).model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    model = ModelConfig(str(tmp_path))
    assert shapes(skeleton(model, "lm", torch.float32)) == shapes(skeleton(TINY, "lm", torch.float32))
    with pytest.raises(ConfigError, match="no model folder"):
        skeleton(ModelConfig(str(tmp_path / "none/of/these")), "lm", torch.float32)
