"""A base in 4 bits: what is packed, what it costs, that an adapter trains on it, and that what is exported is what was
trained."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from alignlab.config import EngineConfig, OptimConfig, PeftConfig
from alignlab.data.pack import batch_of
from alignlab.engine.base import make_engine
from alignlab.errors import ConfigError
from alignlab.models import fourbit
from alignlab.models.adapters import apply_peft, merged
from alignlab.models.scorer import Scorer
from alignlab.types import Ask

QLORA = PeftConfig(name="qlora", lora_r=4, lora_alpha=8)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.float32}
HEADS = ["lm", "scalar"]

needs_package = pytest.mark.skipif(not fourbit.installed(), reason="bitsandbytes is not installed (extra qlora)")


def scores(scorer: Any, batch: Any, head: str) -> Tensor:
    found = scorer(batch, Ask("logps" if head == "lm" else "reward"))
    return found.logps if head == "lm" else found.rewards


def train(scorer: Scorer, batch: Any, head: str, optim: OptimConfig, engine: str = "local", steps: int = 12) -> Any:
    """(engine, losses): mean squared distance of the scores from -1."""
    made = make_engine(engine, scorer, optim, EngineConfig(engine), next(scorer.inner.parameters()).dtype)
    losses = []
    for _ in range(steps):
        loss = (scores(made.score, batch, head) + 1).square().mean()
        losses.append(loss.item())
        made.backward(loss, last=True)
        made.step(optim.learning_rate)
    return made, losses


@needs_package
@pytest.mark.parametrize("head", HEADS)
def test_what_is_packed_and_what_it_costs(llama: Any, head: str) -> None:
    plain = sum(p.numel() * p.element_size() for p in llama(head, **SIZES).parameters())
    model = apply_peft(llama(head, **SIZES), QLORA, head, 0)
    packed = {name.rsplit(".base_layer.", 1)[0].rsplit(".", 1)[-1] for name, p in model.named_parameters()
              if p.dtype == torch.uint8}  # fmt: skip
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or "score.modules_to_save" in name for name in trained)
    base = [p for p in model.parameters() if not p.requires_grad]
    # A layer: q, o 64 x 64, k, v 64 x 32, three of 64 x 128 = 36,864 weights, at 4 bytes plain and half a byte packed;
    # two layers save 2 * 36,864 * 3.5 bytes.  (The scales, 8 bits for each 64 weights, are no parameters.)
    whole = plain - 4 * 64 * (head == "scalar")
    frozen_head = 4 * 64 * (head == "scalar")  # peft keeps the head as it was beside the one it trains
    assert sum(p.numel() * p.element_size() for p in base) == whole + frozen_head - 2 * 36_864 * 3.5


@needs_package
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_an_adapter_trains_and_the_export_is_what_was_trained(
    llama: Any, sequences: Any, head: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    batch = batch_of(sequences, "tree")
    sizes = SIZES | {"dtype": dtype}
    rounded = scores(Scorer(apply_peft(llama(head, **sizes), QLORA, head, 0), head, "tree"), batch, head)
    exact = scores(Scorer(llama(head, **sizes), head, "tree"), batch, head)
    scorer = Scorer(apply_peft(llama(head, **sizes), QLORA, head, 0), head, "tree")
    engine, losses = train(scorer, batch, head, OptimConfig(learning_rate=1e-2))
    assert losses[-1] < 0.5 * losses[0]

    engine.train(False)
    with torch.no_grad():
        trained = scores(engine.score, batch, head)
    weights = {name.removeprefix("model."): value for name, value in engine.full_state_dict().items()}
    plain, adapter = merged(llama(head, **sizes), QLORA, head, weights)
    assert list(plain.state_dict()) == list(llama(head, **sizes).state_dict())
    assert {p.dtype for p in plain.parameters()} == {dtype}
    found = scores(Scorer(plain, head, "tree"), batch, head)
    # Rounding to 4 bits moves the scores far more than merging does: a merge into the weights as they were loaded
    # would be found out.
    rounding, merging = (rounded - exact).abs().max(), (found - trained).abs().max()
    assert merging < rounding / (100 if dtype == torch.float32 else 2)
    adapter.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_" in name or name.endswith("score.weight") for name in saved)


@needs_package
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_run_goes_on_bit_for_bit(llama: Any, sequences: Any, name: str, tmp_path: Path) -> None:
    """Adapters are small, so only layers of 4,096 weights and more have 8-bit state; r=64 gives such."""
    batch = batch_of(sequences, "tree")
    config = PeftConfig(name="qlora", lora_r=64, lora_alpha=64)
    optim = OptimConfig(name=name, learning_rate=1e-2)

    def made() -> Scorer:
        return Scorer(apply_peft(llama("lm", **SIZES), config, "lm", 0), "lm", "tree")

    _, losses = train(made(), batch, "lm", optim, steps=6)
    first, begun = train(made(), batch, "lm", optim, steps=3)
    kinds = {v.dtype for state in first._optimizer.state.values() for v in state.values() if isinstance(v, Tensor)}
    assert (torch.uint8 in kinds) == (name == "adamw_8bit")
    first.save(tmp_path)
    scorer = made()
    again = make_engine("local", scorer, optim, EngineConfig("local"), torch.float32)
    again.load(tmp_path)
    for _ in range(3):
        loss = (scores(again.score, batch, "lm") + 1).square().mean()
        begun.append(loss.item())
        again.backward(loss, last=True)
        again.step(optim.learning_rate)
    assert begun == losses
    assert losses[-1] < losses[0]

    other = Scorer(apply_peft(llama("lm", seed=1, **SIZES), config, "lm", 0), "lm", "tree")
    with pytest.raises(ConfigError, match="its frozen is"):
        make_engine("local", other, optim, EngineConfig("local"), torch.float32).load(tmp_path)


@needs_package
@pytest.mark.nightly
def test_deepspeed_trains_the_same(llama: Any, sequences: Any) -> None:
    """What ZeRO cuts up is the adapter alone; six steps give the losses of plain torch."""
    batch = batch_of(sequences, "tree")

    def losses(engine: str, optim: OptimConfig) -> list[float]:
        scorer = Scorer(apply_peft(llama("lm", **SIZES), QLORA, "lm", 0), "lm", "tree")
        made, found = train(scorer, batch, "lm", optim, engine, steps=6)
        made.close()
        return found

    for name, engines in (("adamw", ("zero0", "zero1", "zero2")), ("adamw_8bit", ("zero0",))):
        optim = OptimConfig(name=name, learning_rate=1e-2)
        expected = losses("local", optim)
        for engine in engines:
            assert losses(engine, optim) == pytest.approx(expected, rel=1e-5), engine


def test_what_cannot_be_packed(llama: Any) -> None:
    if fourbit.installed():
        with pytest.raises(ConfigError, match=r"not with model\.dtype=fp64"):
            apply_peft(llama(), QLORA, "lm", 0)
        model = llama(**SIZES)
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and name != "lm_head":
                model.set_submodule(name, torch.nn.Identity())
        with pytest.raises(ConfigError, match="no plain linear layers"):
            fourbit.pack_linears(model)


def test_without_the_package_one_line_says_so(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ConfigError, match=r"peft=qlora needs bitsandbytes: pip install 'alignlab\[qlora\]'"):
        apply_peft(llama(**SIZES), QLORA, "lm", 0)


def test_no_code_comes_from_the_hub_with_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes asks the package ``kernels`` for native code from the hub when it is imported on a CPU."""
    asked = []
    real = builtins.__import__

    def watching(name: str, *rest: Any) -> Any:
        if name == "bitsandbytes":
            asked.append(sys.modules.get("kernels", "not hidden"))
            return object()
        return real(name, *rest)

    monkeypatch.setattr(fourbit, "installed", lambda: True)
    monkeypatch.setattr(builtins, "__import__", watching)
    marker = object()
    for before in (None, marker):
        if before is not None:
            monkeypatch.setitem(sys.modules, "kernels", before)
        fourbit.bitsandbytes("a test")
        assert asked.pop() is None
        assert sys.modules.get("kernels") is before
