"""The proof of a layout: right families pass it, wrong ones do not, and a broken detail is found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from alignlab.errors import ConfigError
from alignlab.models import proof
from alignlab.models.proof import choose_layout, prove, sequences, small_copy
from alignlab.ops import attention
from alignlab.ops.logps import LogitTransform

BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
GPT = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

TREE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 32},
    "gemma2": {"head_dim": 8, "sliding_window": 32},
    "gemma3_text": {"head_dim": 8, "sliding_window": 32, "num_hidden_layers": 6},
    "gpt2": GPT,
    "gpt_neox": {},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "smollm3": {"num_hidden_layers": 4},
}
ROWS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 32},
    "lfm2": {"full_attn_idxs": [1]},
    "qwen3_5_text": {**LINEAR, "num_hidden_layers": 4},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**MOE, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 32, "rope_parameters": None},
    "qwen3_next": {**LINEAR, **MOE, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
}


def make(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    given = {**TREE, **ROWS, **EXPERTS}.get(name, {})
    config = hf.AutoConfig.for_model(name, **{**BASE, **given, **options})
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("name", TREE)
def test_families_that_take_the_tree(name):
    layout, line = choose_layout(make(name), "auto")
    assert (layout, line) == ("tree", f"layout tree: proved exact for {name}")


@pytest.mark.parametrize("name", TREE)
def test_families_that_take_the_tree_node_by_node(name):
    assert prove(make(name), "tree", form="nodes").exact


@pytest.mark.parametrize("name", [*TREE, *EXPERTS])
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_the_other_layouts_are_exact_for_them(name, layout):
    expected = name != "qwen3_next" or layout == "rows"
    assert prove(make(name), layout).exact == expected


@pytest.mark.parametrize("name", ROWS)
def test_families_that_only_padded_rows_are_right_for(name):
    layout, line = choose_layout(make(name), "auto")
    assert layout == "rows"
    assert "tree is not: " in line
    assert "packed is not: " in line
    with pytest.raises(ConfigError, match=r"model\.layout=tree is not exact for") as caught:
        choose_layout(make(name), "tree")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_get_rows_and_the_tree_where_asked_for_and_exact(name):
    layout, line = choose_layout(make(name), "auto")
    assert layout == "rows"
    assert "mixtures of experts" in line
    if name == "qwen3_next":  # it has linear attention, too
        with pytest.raises(ConfigError, match="not exact"):
            choose_layout(make(name), "tree")
    else:
        assert choose_layout(make(name), "tree")[0] == "tree"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_mixed_inputs_too(name):
    assert prove(make(name), "tree", mixes_inputs=True).exact
    assert prove(make(name), "rows", mixes_inputs=True).exact


def test_reward_models(llama):
    model = llama("scalar")
    assert choose_layout(model, "auto")[0] == "tree"
    assert choose_layout(model, "rows")[0] == "rows"


def test_the_model_is_left_as_it_was():
    model = make("llama").train()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    state = torch.random.get_rng_state()
    choose_layout(model, "auto")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    assert choose_layout(make("llama", dtype), "auto")[0] == "tree"


def test_an_unknown_layout():
    with pytest.raises(ConfigError, match="none of auto, tree, packed, rows"):
        choose_layout(make("llama"), "forest")


# ---------------------------------------------------------------------------------------------------------------
# The proof has teeth: each thing a family needs is taken away, and the proof must notice
# ---------------------------------------------------------------------------------------------------------------


def without(argument: str) -> Callable[..., Any]:
    """The tree attention, deaf to one argument."""

    def deaf(*inputs: Any, **options: Any) -> Any:
        return attention.tree_attention(*inputs, **(options | {argument: None}))

    return deaf


@pytest.mark.parametrize(
    ("name", "argument"),
    [("mistral", "sliding_window"), ("gemma2", "sliding_window"), ("gemma2", "softcap"), ("gpt_oss", "s_aux"),
     ("gemma2", "scaling"), ("gemma3_text", "sliding_window"), ("gpt_oss", "sliding_window")],
)  # fmt: skip
def test_an_argument_that_is_ignored_is_noticed(name, argument, monkeypatch):
    options = {"query_pre_attn_scalar": 24} if argument == "scaling" else {}
    model = make(name, **options)
    assert prove(model, "tree").exact
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, attention.NAME, without(argument))
    verdict = prove(model, "tree")
    assert not verdict.exact
    assert "differ by" in verdict.reason


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_a_logit_transform_that_is_forgotten_is_noticed(name, layout, monkeypatch):
    monkeypatch.setattr("alignlab.models.scorer.logit_transform", lambda config: LogitTransform())
    assert not prove(make(name), layout).exact


def test_a_plan_that_is_swallowed_is_refused(monkeypatch):
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, attention.NAME, without("tree_plan"))
    assert "no attention plan reached" in prove(make("llama"), "tree").reason


def test_sharing_a_token_too_many_is_noticed(monkeypatch):
    original = proof.batch_of

    def shifted(*inputs: Any, **options: Any) -> Any:
        batch = original(*inputs, **options)
        return batch._replace(position_ids=torch.arange(batch.input_ids.numel())[None])

    monkeypatch.setattr(proof, "batch_of", shifted)
    assert not prove(make("gpt2"), "tree").exact


def test_the_real_weights_are_looked_at_too():
    # The copy of a model is right; this model computes something else than its configuration says.
    model = make("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    verdict = prove(model, "rows")
    assert not verdict.exact
    model.lm_head._forward_hooks.clear()
    inner = model.model.layers[1].register_forward_hook(lambda module, inputs, output: output.cumsum(1))
    verdict = prove(model, "tree")  # a layer that carries a state along the line
    assert "real weights" in verdict.reason
    assert prove(model, "rows").exact
    inner.remove()
    assert prove(model, "tree").exact


# ---------------------------------------------------------------------------------------------------------------
# The copy
# ---------------------------------------------------------------------------------------------------------------


def test_the_copy_has_one_layer_of_each_type():
    config = small_copy(make("gemma3_text")).config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.sliding_window == proof.WINDOW
    config = small_copy(make("smollm3")).config  # every fourth layer has no rotary embedding
    assert config.no_rope_layers == [1, 0]
    assert small_copy(make("llama")).config.num_hidden_layers == 1
    assert len(small_copy(make("qwen3_5_text")).config.layer_types) == 2


def test_the_copy_keeps_heads_and_their_groups():
    model = make("llama", hidden_size=128, num_attention_heads=16, num_key_value_heads=8)
    config = small_copy(model).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)


def test_rows_are_longer_than_the_window_before_and_after_the_branch():
    first, second, other = sequences()
    shared = proof.WINDOW + 3 + 3
    assert first.tokens[:shared].tolist() == second.tokens[:shared].tolist()
    assert min(len(first.tokens), len(second.tokens)) >= shared + proof.WINDOW
    assert len(other.tokens) > proof.WINDOW
    assert first.target[shared - 1] == second.target[shared - 1] == True  # noqa: E712 - a target of both
