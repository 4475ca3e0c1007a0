"""The ragged form of attention: its twin against the padded groups, and what the adapters hand to each kernel.

No kernel runs on a CPU.  Their imitations here have the signatures of the releases they stand for, word for word, and
compute by the twin what the arguments that arrive say: a wrong or missing argument gives other numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alignlab.data import trie
from alignlab.data.pack import attention_plan
from alignlab.errors import ConfigError
from alignlab.ops import ragged
from alignlab.ops.attention import tree_attention
from alignlab.ops.ragged import naive_ragged_attention, ragged_attention
from alignlab.ops.ragged_kernels import Call, Kernel, call_of, flash_varlen
from alignlab.ops.ragged_kernels import torch_varlen as adapt
from alignlab.types import AttentionPlan, EncodedSequence

PLAIN = Call(head_dim=64, value_dim=64, shared=1, own_scale=None, windowed=False, capped=False, sinks=False)
H100, A10 = (9, 0), (8, 6)


def random_tree(seed: int) -> trie.Trie:
    """Rows that branch off each other at any depth, and lone ones."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 9, rng.integers(1, 12))]
    for _ in range(rng.integers(2, 7)):
        start = rows[rng.integers(len(rows))]
        rows.append(np.concatenate((start[: rng.integers(len(start) + 1)], rng.integers(0, 9, rng.integers(1, 9)))))
    return trie.build([EncodedSequence(row.astype(np.int32), np.zeros(len(row), bool)) for row in rows], False)


def tensors(length: int, shared: int = 2, heads: int = 4) -> list[Tensor]:
    """Query [1, H, L, 8], key and value [1, H / shared, L, 8]."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, 8), *[(1, heads // shared, length, 8)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_row(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor[0].transpose(0, 1) for tensor in inputs]


def assert_equal(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True), strict=True,
    )  # fmt: skip
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.5}, {"window": 4, "scaling": 0.7}], ids=str)
def test_the_twin_equals_the_padded_groups(seed: int, options: dict[str, Any]) -> None:
    line = random_tree(seed)
    plan, inputs = attention_plan(line), tensors(len(line.tokens), shared=(1, 2, 4)[seed % 3])
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64) if seed % 2 else None
    names = {"window": "sliding_window"}
    hf = {names.get(name, name): value for name, value in options.items()}
    grouped = tree_attention(nn.Module(), *inputs, None, tree_plan=plan, s_aux=sinks, **hf)[0][0]
    assert_equal(naive_ragged_attention(*by_row(inputs), plan, s_aux=sinks, **options), grouped, inputs)


@pytest.mark.parametrize("seed", range(5))
def test_keys_are_gathered_in_path_order(seed: int) -> None:
    """So a window on the path is a window on the gathered keys: key k of a node stands at depth k."""
    line = random_tree(seed)
    plan = attention_plan(line, form="ragged")
    for node in range(len(plan.cu_q) - 1):
        keys = plan.kv_index[plan.cu_k[node] : plan.cu_k[node + 1]]
        assert line.depth[keys.numpy()].tolist() == list(range(len(keys)))
        own = torch.arange(plan.cu_q[node], plan.cu_q[node + 1])
        assert torch.equal(keys[-len(own) :], own)


def test_bottom_right_by_hand() -> None:
    # The root is rows 0 1 2, its child rows 3 4: the child's first query sees 0 1 2 3, its last 0 1 2 3 4.
    paths = [np.array(p, dtype=np.int32) for p in ([0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 5])]
    plan = attention_plan(trie.build([EncodedSequence(p, np.zeros(len(p), bool)) for p in paths], False))
    query = torch.zeros(6, 1, 6, dtype=torch.float64)  # equal scores: the output is the mean of what is visible
    value = torch.eye(6, dtype=torch.float64)[:, None]
    found = naive_ragged_attention(query, query, value, plan)[:, 0]
    seen = [row.nonzero()[:, 0].tolist() for row in found]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5]]


# ---------------------------------------------------------------------------------------------------------------
# Imitations of the kernels
# ---------------------------------------------------------------------------------------------------------------

Attend = Callable[..., Tensor]


def imitated(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    causal: bool, window: tuple[int, int], scale: float | None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Flash attention's semantics for gathered keys, refusing what the kernels refuse."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert isinstance(max_q, int)
    assert isinstance(max_k, int)
    assert max_q == int(cu_q.diff().max())
    assert max_k == int(cu_k.diff().max())
    assert len(key) == len(value) == int(cu_k[-1])
    assert len(query) == int(cu_q[-1])
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert causal or window[1] == 0, "attention to later keys"
    plan = AttentionPlan(cu_q, cu_k, torch.arange(len(key)), max_q, max_k, ())
    left = window[0]  # flash attention: so many keys before the query's own
    width = None if left < 0 else left + 1
    return naive_ragged_attention(query, key, value, plan, scaling=scale, window=width, softcap=softcap)


def varlen_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    assert return_aux is None
    assert query.shape[1] == key.shape[1], "nothing in this signature says that fewer key heads are taken"
    places = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return imitated(*places, causal=is_causal, window=(-1, -1), scale=None)


def varlen_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    assert return_aux is None
    assert query.shape[1] == key.shape[1]
    assert type(window_size) is tuple, "it is compared with a tuple to find out whether attention is causal"
    places = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return imitated(*places, causal=window_size == (-1, 0), window=window_size, scale=scale)


def varlen_2_13(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    assert return_aux is seqused_k is block_table is num_splits is None
    assert type(window_size) is tuple
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert cu_seq_k is not None
    places = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return imitated(*places, causal=window_size == (-1, 0), window=window_size, scale=scale)


def flash_2_8(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    places = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    right = (window_size[0], 0) if causal else window_size  # as its interface says of causal windows
    return imitated(*places, causal=causal, window=right, scale=softmax_scale, softcap=softcap or None)


KERNELS: dict[str, Kernel] = {
    "torch 2.10": adapt(varlen_2_10, "2.10"),
    "torch 2.11": adapt(varlen_2_11, "2.11"),
    "torch 2.13": adapt(varlen_2_13, "2.13"),
    "flash-attn": flash_varlen(flash_2_8, "2.8"),
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "scale": {"scaling": 0.7}, "window": {"window": 3}, "wide window": {"window": 1000},
    "cap": {"softcap": 1.5},
}  # fmt: skip
NOT_SERVED = {("torch 2.10", "scale"), ("torch 2.10", "window"), ("torch 2.10", "wide window")} | {
    (name, "cap") for name in KERNELS if name != "flash-attn"
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shared", [1, 2])
def test_every_signature_gets_the_right_arguments(name: str, case: str, shared: int) -> None:
    kernel, options = KERNELS[name], CASES[case]
    line = random_tree(3)
    plan, inputs = attention_plan(line, form="ragged"), tensors(len(line.tokens), shared)
    call = call_of(*by_row(inputs), options.get("scaling"), options.get("window"), options.get("softcap"), None)
    assert bool(kernel.lacks(call)) == ((name, case) in NOT_SERVED)
    if (name, case) not in NOT_SERVED:
        found = ragged_attention(*by_row(inputs), plan, kernel, **options)
        assert_equal(found, naive_ragged_attention(*by_row(inputs), plan, **options), inputs)


def test_the_installed_torch_has_a_signature_that_is_known() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = [set(inspect.signature(f).parameters) for f in (varlen_2_10, varlen_2_11, varlen_2_13)]
    names = set(inspect.signature(varlen_attn).parameters)
    assert any(names >= each for each in known)
    assert not adapt(varlen_attn).lacks(PLAIN)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"scaling": 0.7}], ids=str)
def test_the_installed_torch_takes_the_arguments(options: dict[str, Any]) -> None:
    """Its own operator, forward and backward, on tensors without contents: types and shapes are checked for real."""
    from torch.nn.attention.varlen import varlen_attn

    plan = ragged.sample_plan("meta")
    length = sum(ragged.SIZES)
    shapes = ((length, 8, 64), *((length, 2, 64),) * 2)
    query, key, value = (torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes)
    found = ragged_attention(query, key, value, plan, adapt(varlen_attn), **options)
    assert found.shape == query.shape
    gradients = torch.autograd.grad(found.sum(), (query, key, value))
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


def test_nothing_is_gathered_where_nothing_is_shared() -> None:
    """Packed rows share no key: the kernel gets the line itself."""
    rows = [EncodedSequence(np.arange(n, dtype=np.int32), np.zeros(n, bool)) for n in (4, 2, 5)]
    plan = attention_plan(trie.build(rows, False, range(3)), form="ragged")
    assert torch.equal(plan.kv_index, torch.arange(11))
    seen: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, *others: Any) -> Tensor:
        seen.append(key)
        return query

    inputs = by_row(tensors(11))
    ragged_attention(*inputs, plan, Kernel("spy", attend, lambda call: ""))
    assert seen[0] is inputs[1]


@pytest.mark.parametrize(("dtype", "sum_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_gradients_of_shared_keys_are_added_in_float32(dtype: torch.dtype, sum_dtype: torch.dtype) -> None:
    """On a GPU a bfloat16 sum of ones stops growing at 256 (2^8); a prompt may have more tokens behind it."""
    seen: list[torch.dtype] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("index_add", "index_add_"):
                seen.extend((args[0].dtype, args[3].dtype))
            return func(*args, **(kwargs or {}))

    line = torch.zeros(3, 2, 4, dtype=dtype, requires_grad=True)
    gathered = ragged._Gathered.apply(line, torch.tensor([0, 1, 0, 2, 0]))
    with Spy():
        (gradient,) = torch.autograd.grad(gathered.sum(), line)
    assert seen == [sum_dtype, sum_dtype]
    assert gradient.dtype == dtype
    assert gradient[:, 0, 0].tolist() == [3, 1, 1]


# ---------------------------------------------------------------------------------------------------------------
# Which kernel
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "dtype", "capability", "reason"),
    [
        ({}, torch.bfloat16, H100, ""),
        ({}, torch.float16, A10, ""),
        ({"head_dim": 256, "value_dim": 256}, torch.bfloat16, H100, ""),
        ({}, torch.float32, H100, "no kernel for float32"),
        ({}, torch.bfloat16, (7, 5), "capability 7.5 is below 8.0"),
        ({"sinks": True}, torch.bfloat16, H100, "sinks"),
        ({"value_dim": 128}, torch.bfloat16, H100, "values of size 128"),
        ({"head_dim": 60, "value_dim": 60}, torch.bfloat16, H100, "heads of size 60"),
        ({"head_dim": 264, "value_dim": 264}, torch.bfloat16, H100, "heads of size 264"),
        ({"head_dim": 256, "value_dim": 256}, torch.bfloat16, A10, "heads of size 256 on compute capability 8.6"),
        ({"head_dim": 200, "value_dim": 200}, torch.bfloat16, (12, 0), "heads of size 200 on compute capability 12.0"),
        ({"capped": True}, torch.bfloat16, H100, "has no soft-capped scores"),
    ],
)
def test_the_limits_of_the_kernels(
    call: dict[str, Any], dtype: torch.dtype, capability: tuple[int, int], reason: str
) -> None:
    found = ragged.refusal(KERNELS["torch 2.13"], PLAIN._replace(**call), dtype, capability)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An H100 that is none: kernels are believed (``exact``) or not without being run."""

    def pretend(*kernels: Kernel, exact: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
        monkeypatch.setattr(ragged, "kernels", lambda: kernels)
        monkeypatch.setattr(ragged, "disproof", lambda kernel, *others: "" if exact else f"{kernel.name} differs")
        ragged.kernel_for.cache_clear()

    yield pretend
    ragged.kernel_for.cache_clear()


def choose(*calls: Call, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, str]:
    return ragged.choose(calls, dtype, torch.device("cuda", 0))


def test_the_choice(gpu: Callable[..., None]) -> None:
    old, flash = KERNELS["torch 2.10"], KERNELS["flash-attn"]
    windowed = PLAIN._replace(windowed=True)
    gpu(KERNELS["torch 2.13"], flash)
    assert choose(PLAIN, windowed) == (True, "varlen attention of torch 2.13")
    assert choose(PLAIN, dtype=torch.float32) == (False, "no kernel for float32")
    gpu(old, flash)
    assert choose(PLAIN, windowed) == (True, "varlen attention of torch 2.10 and flash-attn 2.8")
    gpu(old)
    assert choose(PLAIN) == (True, "varlen attention of torch 2.10")
    assert choose(PLAIN, windowed) == (False, "varlen attention of torch 2.10 has no sliding window")
    gpu()
    assert choose(PLAIN) == (False, "no varlen attention in this torch and no flash-attn")
    gpu(flash, exact=False)
    assert choose(PLAIN) == (False, "flash-attn 2.8 differs")
    assert ragged.choose([PLAIN], torch.bfloat16, torch.device("cpu")) == (False, "no kernel for a cpu")


def test_no_kernel_and_no_groups_is_said(gpu: Callable[..., None]) -> None:
    line = random_tree(0)
    inputs = tensors(len(line.tokens))
    with pytest.raises(ConfigError, match="no padded groups, and there is no ragged kernel: no kernel for a cpu"):
        tree_attention(nn.Module(), *inputs, None, tree_plan=attention_plan(line, form="ragged"))


def test_the_attention_function_takes_a_plan_without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    line = random_tree(1)
    inputs = tensors(len(line.tokens))
    options = {"scaling": 0.3, "sliding_window": 4}
    grouped = tree_attention(nn.Module(), *inputs, None, tree_plan=attention_plan(line), **options)[0]
    monkeypatch.setattr(ragged, "kernel_for", lambda call, dtype, device: (KERNELS["torch 2.13"], ""))
    found = tree_attention(nn.Module(), *inputs, None, tree_plan=attention_plan(line, form="ragged"), **options)[0]
    assert found.shape == grouped.shape
    assert_equal(found, grouped, inputs)


def test_what_the_layers_ask_for_is_collected() -> None:
    line = random_tree(0)
    calls: set[Call] = set()
    inputs = tensors(len(line.tokens))
    for window in (None, 3, 4):
        options = {"tree_plan": attention_plan(line), "tree_calls": calls, "sliding_window": window}
        tree_attention(nn.Module(), *inputs, None, scaling=8**-0.5, **options)
    plain = Call(head_dim=8, value_dim=8, shared=2, own_scale=None, windowed=False, capped=False, sinks=False)
    assert calls == {plain, plain._replace(windowed=True)}


# ---------------------------------------------------------------------------------------------------------------
# The proof of a kernel
# ---------------------------------------------------------------------------------------------------------------


def wrong(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Kernel:
    """The newest signature, with one thing done wrong inside the kernel."""

    def kernel(*places: Any, return_aux: Any = None, scale: float | None = None,
               window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> Tensor:  # fmt: skip
        arguments = {"places": places, "scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
        changed = change(arguments)
        return varlen_2_13(*changed.pop("places"), **changed)

    return adapt(kernel, "wrong")


def top_left(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """Causal from the top-left corner: a node's queries see as many of the first keys as there are queries."""
    outputs = []
    for node in range(len(cu_q) - 1):
        rows = slice(int(cu_q[node]), int(cu_q[node + 1]))
        keys = slice(int(cu_k[node]), int(cu_k[node]) + rows.stop - rows.start)
        size = rows.stop - rows.start
        plan = AttentionPlan(torch.tensor([0, size]), torch.tensor([0, size]), torch.arange(size), size, size, ())
        outputs.append(naive_ragged_attention(query[rows], key[keys], value[keys], plan))
    return torch.cat(outputs)


FAULTS: dict[str, tuple[Kernel, dict[str, Any]]] = {
    "top-left": (
        Kernel("top-left", lambda q, k, v, plan, *_: top_left(q, k, v, plan.cu_q, plan.cu_k), lambda call: ""), {},
    ),
    "scale ignored": (wrong(lambda a: {**a, "scale": None}), {"own_scale": 0.3}),
    "one key more": (wrong(lambda a: {**a, "window_size": (a["window_size"][0] + 1, 0)}), {"windowed": True}),
    "window ignored": (wrong(lambda a: {**a, "window_size": (-1, 0)}), {"windowed": True}),
    "no gradient": (wrong(lambda a: {**a, "places": (a["places"][0].detach(), *a["places"][1:])}), {}),
    "values exchanged": (
        wrong(lambda a: {**a, "places": (*a["places"][:2], a["places"][2].flip(0), *a["places"][3:])}), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_computes_something_else_is_found_out(fault: str) -> None:
    kernel, call = FAULTS[fault]
    call = PLAIN._replace(head_dim=16, value_dim=16, **call)
    found = ragged.disproof(kernel, call, torch.bfloat16, torch.device("cpu"))
    assert kernel.name in found, found


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("call", [{}, {"shared": 4}, {"windowed": True}, {"own_scale": 0.3}, {"capped": True}], ids=str)
def test_sound_kernels_pass(name: str, call: dict[str, Any]) -> None:
    asked = PLAIN._replace(head_dim=16, value_dim=16, **call)
    if not KERNELS[name].lacks(asked):
        assert ragged.disproof(KERNELS[name], asked, torch.bfloat16, torch.device("cpu")) == ""


def test_flash_attn_is_found_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func, module.__version__ = flash_2_8, "2.8.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    ragged.kernels.cache_clear()
    assert [kernel.name for kernel in ragged.kernels()][-1] == "flash-attn 2.8.3"
    ragged.kernels.cache_clear()
