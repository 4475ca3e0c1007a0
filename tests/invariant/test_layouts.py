"""What a row's neighbours are never changes its numbers: every layout against separate rows, values and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data.pack import batch_of
from alignlab.models.scorer import Scorer
from alignlab.types import Ask, EncodedSequence, Mix

VOCABULARY, POSITIONS = 41, 64
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative, of log-probabilities and of the whole gradient."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "rope_parameters": None},
}


def make(name: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    size = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    if name == "gpt2":
        size = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = hf.AutoConfig.for_model(name, **{**size, **tokens, **FAMILIES[name]})
    config._experts_implementation = "eager"  # the grouped kernels have no float64
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def trees(seed: int, count: int = 3) -> list[EncodedSequence]:
    """Paths that branch from each other anywhere, targets anywhere but first; a token may be context elsewhere."""
    rng = np.random.default_rng(seed)
    made: list[EncodedSequence] = []
    for _ in range(count):
        tokens, target = rng.integers(0, VOCABULARY, rng.integers(2, 9)), None
        if made and rng.random() < 0.8:  # continue a beginning of an earlier one
            parent = made[rng.integers(len(made))]
            cut = int(rng.integers(1, len(parent.tokens) + 1))
            tokens = np.concatenate((parent.tokens[:cut], tokens))[: POSITIONS - 8]
        target = rng.random(len(tokens)) < 0.5
        target[0] = False
        target[-1] = True
        made.append(EncodedSequence(tokens.astype(np.int32), target))
    return made


def separate(model: Any, sequences: list[EncodedSequence], mixed: bool) -> torch.Tensor:
    """Log-probabilities of all targets by the unmodified model, one sequence at a time."""
    found = []
    for sequence in sequences:
        ids, target = torch.from_numpy(sequence.tokens.astype(np.int64)), torch.from_numpy(sequence.target)
        embedding = model.get_input_embeddings()
        inputs = embedding(ids)
        if mixed:
            inputs = torch.where(target[:, None], 0.7 * inputs + 0.3 * embedding((ids + 1) % VOCABULARY), inputs)
        logits = model(inputs_embeds=inputs[None], attention_mask=torch.ones_like(ids)[None], use_cache=False).logits
        places = target.nonzero()[:, 0]
        found.append(logits[0].log_softmax(-1)[places - 1].gather(1, ids[places, None])[:, 0])
    return torch.cat(found)


def together(model: Any, sequences: list[EncodedSequence], layout: str, mixed: bool) -> torch.Tensor:
    batch = batch_of(sequences, layout, mixes_inputs=mixed)
    mix = Mix((batch.targets + 1) % VOCABULARY, 0.3) if mixed else None
    logps = Scorer(model, "lm", layout)(batch, Ask("logps", mix)).logps
    assert logps is not None
    return logps[batch.seq_idx]


def gradient(model: Any, logps: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1.0, 1.5, len(logps), dtype=logps.dtype)
    parameters = list(model.parameters())
    found = torch.autograd.grad((weights * logps).sum(), parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def check(name: str, dtype: torch.dtype, layout: str, mixed: bool, seed: int) -> None:
    sequences = trees(seed, 5)
    plain = make(name, dtype, "eager")
    expected = separate(plain, sequences, mixed)
    expected_gradient = gradient(plain, expected)
    model = make(name, dtype)
    found = together(model, sequences, layout, mixed)
    found_gradient = gradient(model, found)
    assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert (found_gradient - expected_gradient).norm() <= TOLERANCE[dtype] * expected_gradient.norm()
    if mixed:  # else the case would say nothing
        assert not torch.allclose(found, together(model, sequences, layout, False), rtol=1e-3)


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("layout", ["tree", "packed", "rows"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_equal_separate_rows(name: str, dtype: torch.dtype, layout: str, mixed: bool) -> None:
    check(name, dtype, layout, mixed, seed=1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), layout=st.sampled_from(["tree", "packed", "rows"]), mixed=st.booleans())
def test_any_tree(seed: int, layout: str, mixed: bool) -> None:
    check("mistral", torch.float64, layout, mixed, seed)


def test_a_turn_that_is_a_target_here_and_context_there() -> None:
    # The same tokens; the second sequence predicts only what follows them.
    tokens = np.arange(1, 11, dtype=np.int32)
    first = EncodedSequence(tokens[:7], np.arange(7) >= 4)
    second = EncodedSequence(tokens, np.arange(10) >= 7)
    for mixed in (False, True):
        plain, model = make("llama", torch.float64), make("llama", torch.float64)
        batch = batch_of([first, second], "tree", mixes_inputs=mixed)
        # Mixed inputs differ, so the shared part is the prompt alone; plain ones share all seven tokens.
        assert batch.input_ids.shape[1] == (10 + 3 if mixed else 10)
        expected = separate(plain, [first, second], mixed)
        found = together(model, [first, second], "tree", mixed)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        one, other = gradient(model, found), gradient(plain, expected)
        assert (one - other).norm() <= 1e-6 * other.norm()
