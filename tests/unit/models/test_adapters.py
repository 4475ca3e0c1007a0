"""Low-rank adapters: what they touch, how they start, and what merging gives."""

from __future__ import annotations

import pytest
import torch

from alignlab.config import PeftConfig
from alignlab.data.pack import batch_of
from alignlab.errors import ConfigError
from alignlab.models.adapters import apply_peft, merged
from alignlab.models.scorer import Scorer
from alignlab.types import Ask

LORA = PeftConfig(name="lora", lora_r=3, lora_alpha=6)


def test_none_is_the_model_itself(llama):
    model = llama()
    assert apply_peft(model, PeftConfig(), "lm", 0) is model


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_what_is_trained(llama, head):
    model = apply_peft(llama(head), LORA, head, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    rest = {name for name in trained if ".lora_" not in name}
    assert all("score.modules_to_save" in name for name in rest)
    assert bool(rest) == (head == "scalar")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_new_adapter_changes_nothing(llama, sequences, head, layout):
    ask = Ask("logps" if head == "lm" else "reward")
    batch = batch_of(sequences, layout)
    plain = Scorer(llama(head), head, layout)(batch, ask)
    found = Scorer(apply_peft(llama(head), LORA, head, 0), head, layout)(batch, ask)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_the_seed_decides_and_the_random_state_stays(llama):
    state = torch.random.get_rng_state()
    one, again, other = (
        apply_peft(model, LORA, "lm", seed).state_dict() for model, seed in ((llama(), 0), (llama(), 0), (llama(), 1))
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])
    torch.random.set_rng_state(state)
    model = llama()
    before = torch.random.get_rng_state()
    apply_peft(model, LORA, "lm", 0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_merging_a_trained_adapter(llama, sequences, tmp_path, head):
    ask = Ask("logps" if head == "lm" else "reward")
    batch = batch_of(sequences, "tree")
    scorer = Scorer(apply_peft(llama(head), LORA, head, 0), head, "tree")
    optimizer = torch.optim.SGD([p for p in scorer.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        scores = scorer(batch, ask)
        (scores.logps if head == "lm" else scores.rewards).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = scorer(batch, ask)
    before = Scorer(llama(head), head, "tree")(batch, ask)
    plain, adapter = merged(llama(head), LORA, head, scorer.model.state_dict())
    assert list(plain.state_dict()) == list(llama(head).state_dict())
    found = Scorer(plain, head, "tree")(batch, ask)
    for one, other, start in zip(found, trained, before, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
            assert (one - start).abs().max() > 1e-3
    adapter.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_" in name or name.endswith("score.weight") for name in saved)
    assert any(name.endswith("score.weight") for name in saved) == (head == "scalar")


def test_refusals(llama):
    with pytest.raises(ConfigError, match="output layer"):
        apply_peft(llama(), PeftConfig(name="lora", lora_target_modules="q_proj,lm_head"), "lm", 0)
    with pytest.raises(ConfigError, match="lora_target_modules"):
        apply_peft(llama(), PeftConfig(name="lora", lora_target_modules="nothing_like_it"), "lm", 0)
