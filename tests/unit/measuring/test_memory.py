"""The bytes of a model's states, against the tensors of the plain engine; ZeRO's are in tests/distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config import EngineConfig, ModelConfig, OptimConfig, PeftConfig
from alignlab.data.pack import batch_of
from alignlab.engine import deepspeed
from alignlab.engine.base import make_engine
from alignlab.measuring.memory import gib, model_states
from alignlab.models import fourbit
from alignlab.models.adapters import apply_peft
from alignlab.models.load import DTYPES
from alignlab.models.proof import sequences
from alignlab.models.scorer import Scorer
from alignlab.models.skeleton import skeleton, with_adapters
from alignlab.types import Ask

needs_bitsandbytes = pytest.mark.skipif(not fourbit.installed(), reason="bitsandbytes is not installed (extra qlora)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration and no weights."""
    from transformers import LlamaConfig

    place = tmp_path_factory.mktemp("shape")
    config = LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(place)
    return place


def held(tensors: Any) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def real(folder: Path, dtype: str, peft: PeftConfig, optim: OptimConfig) -> dict[str, int]:
    """One step, then a micro-batch of the next one: what the plain engine holds."""
    from transformers import AutoConfig, LlamaForCausalLM

    model = apply_peft(LlamaForCausalLM(AutoConfig.from_pretrained(folder)).to(DTYPES[dtype]), peft, "lm", 0)
    engine: Any = make_engine("local", Scorer(model, "lm", "rows"), optim, EngineConfig("local"), DTYPES[dtype])
    batch = batch_of(sequences(), "rows")
    for _ in range(2):
        logps = engine.score(batch, Ask()).logps
        engine.backward(-logps.double().mean(), last=True)
        if not engine.updates:
            engine.step(1e-3)
    weights = list(model.parameters())
    scales = [s for p in weights for s in _scales(getattr(p, "quant_state", None))]
    state = [v for of_one in engine._optimizer.state.values() for v in of_one.values() if isinstance(v, Tensor)]
    return {
        "parameters": held([*weights, *scales]),
        "master weights": held(engine._masters.values()),
        "gradients": held([p.grad for p in weights] + [m.grad for m in engine._masters.values()]),
        "optimizer": held(state),
    }


def _scales(state: Any) -> list[Tensor]:
    return [] if state is None else [state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]


def predicted(folder: Path, dtype: str, peft: PeftConfig, optim: OptimConfig) -> dict[str, int]:
    base = skeleton(ModelConfig(str(folder)), "lm", DTYPES[dtype])
    model = with_adapters(base, peft, "lm")
    return model_states(model.module, model.packed, "local", 1, DTYPES[dtype], optim).device


@pytest.mark.parametrize("optim", ["adamw", "rmsprop"])
@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plain_engine_holds_what_was_predicted(folder: Path, dtype: str, peft: str, optim: str) -> None:
    settings = folder, dtype, PeftConfig(peft, lora_r=4), OptimConfig(name=optim)
    assert predicted(*settings) == real(*settings)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_moments_of_eight_bits(folder: Path, dtype: str) -> None:
    settings = folder, dtype, PeftConfig(), OptimConfig(name="adamw_8bit")
    assert predicted(*settings) == real(*settings)


@needs_bitsandbytes
def test_a_base_in_four_bits(folder: Path) -> None:
    settings = folder, "bf16", PeftConfig("qlora", lora_r=4), OptimConfig()
    assert predicted(*settings) == real(*settings)


def test_by_hand(folder: Path) -> None:
    """101 x 64 embeddings, tied; a layer has q, o 64 x 64, k, v 64 x 32, three of 64 x 96 and two norms of 64: 30,848.

    With the last norm that is 6,464 + 2 x 30,848 + 64 = 68,224 parameters in 1 + 2 x 9 + 1 = 20 tensors.
    """
    found = predicted(folder, "bf16", PeftConfig(), OptimConfig())
    n = 68_224
    assert found == {"parameters": 2 * n, "master weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n + 4 * 20}
    assert gib(found)["total"] == (18 * n + 80) / 2**30


def test_zero_divides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 at 4 ranks: 18 bytes a parameter without ZeRO; ZeRO-2 keeps the parameters whole, ZeRO-3 nothing but norms.

    ZeRO-3 keeps the five norms of 64 (and here all else too, but for the threshold) whole besides.
    """
    monkeypatch.setattr(deepspeed, "PERSISTENCE", 100_000)  # ranks that are tests of this process may have changed it
    module = skeleton(ModelConfig(str(folder)), "lm", torch.bfloat16)
    n = 68_224

    def of(engine: str, ranks: int = 4, offload: bool = False) -> Any:
        return model_states(module, {}, engine, ranks, torch.bfloat16, OptimConfig(), offload)

    one, two, three = (of(engine).device for engine in ("zero1", "zero2", "zero3"))
    assert one == {
        "parameters": 2 * n, "master weights": n, "gradients": 6 * n, "optimizer": 2 * n + 4, "buffers": 0,
    }  # fmt: skip
    assert two == {
        "parameters": 2 * n, "master weights": n, "gradients": n, "optimizer": 2 * n + 4, "buffers": 2 * n,
    }  # fmt: skip
    assert three == {
        "parameters": n // 2 + 2 * n, "master weights": n, "gradients": n, "optimizer": 2 * n + 4, "buffers": 4 * n,
    }  # fmt: skip
    offloaded = of("zero2", offload=True)
    assert offloaded.host["master weights"] == n
    assert offloaded.host["optimizer"] == 2 * n + 4
    assert "optimizer" not in offloaded.device
    assert of("zero3").gathered == 0, "all parameters are below the threshold"
