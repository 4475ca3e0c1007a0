"""Prompt-tree attention against one dense mask, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alignlab.data import trie
from alignlab.data.pack import attention_plan, dense_mask
from alignlab.errors import ConfigError
from alignlab.ops.attention import naive_tree_attention, no_mask, tree_attention
from alignlab.types import AttentionPlan, EncodedSequence


def tree(seed: int) -> trie.Trie:
    """Paths that branch at several depths, and a lone one."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 9, 8)
    paths = [np.concatenate((prompt[:cut], rng.integers(0, 9, size))) for cut, size in ((8, 5), (8, 9), (5, 7), (2, 3))]
    paths.append(rng.integers(10, 19, 11))
    return trie.build([EncodedSequence(p.astype(np.int32), np.zeros(len(p), bool)) for p in paths], False)


def tensors(length: int, heads: int = 4, shared: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, length, 8), (1, heads // shared, length, 8), (1, heads // shared, length, 6)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(plan: AttentionPlan | None, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    return tree_attention(nn.Module(), query, key, value, options.pop("mask", None), tree_plan=plan, **options)[0]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("form", ["padded", "nodes"])
def test_equals_one_dense_mask(window: int | None, shared: int, form: str) -> None:
    line = tree(0)
    plan, length = attention_plan(line, form), len(line.tokens)
    assert bool(plan.groups) == (form == "padded")
    inputs = tensors(length, shared=shared)
    found = run(plan, *inputs, scaling=0.3, sliding_window=window)
    expected = naive_tree_attention(
        *(t[0] for t in inputs), dense_mask(plan, length), 0.3, torch.from_numpy(line.depth), window
    )
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found[0] * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["padded", "nodes"])
def test_a_window_counts_positions_on_the_path(form: str) -> None:
    # Tokens 0 1 2 | 3 4 (child) | 5 6 (its sibling): on the line 6 is 4 rows after 2, on its path 2 positions.
    paths = [np.array(p, dtype=np.int32) for p in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6])]
    line = trie.build([EncodedSequence(p, np.zeros(5, bool)) for p in paths], False)
    assert line.tokens.tolist() == [0, 1, 2, 3, 4, 5, 6]
    query = torch.zeros(1, 1, 7, 7, dtype=torch.float64)  # equal scores: the output is the mean of what is visible
    value = torch.eye(7, dtype=torch.float64)[None, None]
    found = run(attention_plan(line, form), query, query, value, sliding_window=3)[0, :, 0]
    assert found[6].nonzero()[:, 0].tolist() == [2, 5, 6]
    assert found[4].nonzero()[:, 0].tolist() == [2, 3, 4]
    assert found[1].nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("form", ["padded", "nodes"])
def test_cap_and_sinks_by_hand(form: str) -> None:
    line = tree(1)
    plan, length = attention_plan(line, form), len(line.tokens)
    query, key, value = tensors(length, shared=1)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    found = run(plan, query, key, value, scaling=2.0, softcap=1.5, s_aux=sinks)
    scores = 1.5 * torch.tanh(2.0 * query @ key.transpose(2, 3) / 1.5)
    weights = scores.masked_fill(~dense_mask(plan, length), -torch.inf).exp()
    share = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    expected = (share @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), sinks), torch.autograd.grad(expected.square().sum(), sinks)
    )
    # Neither is a rounding matter.
    assert not torch.allclose(found, run(plan, query, key, value, scaling=2.0, s_aux=sinks), rtol=1e-3)
    assert not torch.allclose(found, run(plan, query, key, value, scaling=2.0, softcap=1.5), rtol=1e-3)


def test_scale_defaults_to_the_head_size() -> None:
    line = tree(2)
    plan = attention_plan(line)
    inputs = tensors(len(line.tokens))
    torch.testing.assert_close(run(plan, *inputs), run(plan, *inputs, scaling=8**-0.5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("form", ["padded", "nodes"])
def test_low_precision(dtype: torch.dtype, tolerance: float, form: str) -> None:
    line = tree(3)
    plan = attention_plan(line, form)
    exact, rounded = tensors(len(line.tokens)), tensors(len(line.tokens), dtype=dtype)
    for options in ({}, {"softcap": 2.0}):
        found = run(plan, *rounded, **options)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), run(plan, *exact, **options), rtol=tolerance, atol=tolerance)


def test_padded_rows_without_a_plan() -> None:
    query, key, value = tensors(6, shared=2)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    found = run(None, query, key, value, mask=mask, scaling=0.5)
    expected = naive_tree_attention(query[0], key[0], value[0], mask[0, 0], 0.5, torch.arange(6))
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_refuses_what_it_would_ignore(options: dict, words: str) -> None:
    line = tree(0)
    with pytest.raises(ConfigError, match=words):
        run(attention_plan(line), *tensors(len(line.tokens)), **options)


def test_refuses_to_guess_without_a_plan() -> None:
    line = tree(0)
    for mask in (None, no_mask(torch.zeros(1))):
        with pytest.raises(ConfigError, match="no attention plan"):
            run(None, *tensors(len(line.tokens)), mask=mask)
    with pytest.raises(ConfigError, match="no padded groups"):
        run(attention_plan(line, form="ragged"), *tensors(len(line.tokens)))


def test_the_nodes_of_a_plan_by_hand() -> None:
    # [0 1] with children [2] and [3 4]: the second child sees rows 0 1 3 4, its first query all but the last.
    paths = [np.array(p, dtype=np.int32) for p in ([0, 1, 2], [0, 1, 3, 4])]
    nodes = attention_plan(
        trie.build([EncodedSequence(p, np.zeros(len(p), bool)) for p in paths], False), "nodes"
    ).nodes
    assert nodes is not None
    assert (nodes.sizes, nodes.paths) == ((2, 1, 2), ((0,), (0, 1), (0, 2)))
    assert nodes.masks[0] is None
    assert nodes.masks[1].tolist() == [[True, True, True]]
    assert nodes.masks[2].tolist() == [[True, True, True, False], [True, True, True, True]]


def test_refuses_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="padded, nodes, ragged"):
        attention_plan(tree(0), "groups")


def test_harmless_arguments_pass() -> None:
    line = tree(0)
    plan, inputs = attention_plan(line), tensors(len(line.tokens))
    options = {"use_cache": False, "position_ids": torch.zeros(1), "output_attentions": False, "future": None}
    torch.testing.assert_close(run(plan, *inputs, **options), run(plan, *inputs))


def test_registered_with_transformers() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS["alignlab_tree"] is tree_attention
    make = ALL_MASK_ATTENTION_FUNCTIONS["alignlab_tree"]
    sizes = SimpleNamespace(batch_size=1, q_length=3, kv_length=3)
    assert make(**vars(sizes), attention_mask=None) is None
    explicit = make(**vars(sizes), attention_mask=torch.tensor([[True, True, False]]))
    assert explicit[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, False]]
