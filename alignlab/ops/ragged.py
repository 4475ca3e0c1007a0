"""Ragged attention: one kernel call for a whole packed line, every node's keys gathered in path order.

The nodes of an :class:`~alignlab.types.AttentionPlan` are rows of a variable-length batch: node i has ``cu_q[i + 1] -
cu_q[i]`` queries and ``cu_k[i + 1] - cu_k[i]`` keys (its ancestors' tokens, then its own), causal from the bottom-right
corner: its last query sees all its keys.  Flash attention aligns that way since its version 2.1, and torch's copy of it
does too; cuDNN aligned top-left, which is one reason why a kernel proves itself here before it is used.

Each kernel (``ops.ragged_kernels``) is used for the calls that it computes exactly and for no others; what is left goes
through the padded groups (``ops.attention``).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from alignlab.ops.ragged_kernels import Call, Kernel, kernels, refusal
from alignlab.types import AttentionPlan

TOLERANCE = 0.02
"""Of the proof: difference of outputs and gradients relative to their norm.  Rounding to bfloat16 gives 0.003, a window
that is one key too wide 0.4."""
WINDOW, CAP = 7, 5.0
"""Of the proof's own calls."""
SIZES, PARENTS = (5, 3, 1, 130, 40, 70), (-1, 0, 1, -1, 3, 3)
"""Of the nodes on the proof's line."""


@lru_cache(maxsize=64)
def kernel_for(call: Call, dtype: torch.dtype, device: torch.device) -> tuple[Kernel | None, str]:
    """(the kernel for a call, or None; why not).  A kernel is tried out before it is named, once a kind of call."""
    if device.type != "cuda":
        return None, f"no kernel for a {device.type}"
    capability = torch.cuda.get_device_capability(device)
    reasons = []
    for kernel in kernels():
        reason = refusal(kernel, call, dtype, capability) or disproof(kernel, call, dtype, device)
        if not reason:
            return kernel, ""
        reasons.append(reason)
    return None, "; ".join(dict.fromkeys(reasons)) or "no varlen attention in this torch and no flash-attn"


def choose(calls: Collection[Call], dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """(whether every one of a model's calls has a kernel, the kernels' names or the first reason why not)."""
    names: list[str] = []
    for call in sorted(calls, key=repr):
        kernel, reason = kernel_for(call, dtype, device)
        if kernel is None:
            return False, reason
        names.append(kernel.name)
    return bool(names), " and ".join(dict.fromkeys(names)) or "no attention call was seen"


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, kernel: Kernel, scaling: float | None = None,
    window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """[L, H, d] of ``query`` [L, H, d], ``key`` and ``value`` [L, G, d], all rows of one packed line.

    A sliding window on the path is one on the gathered keys, which stand in path order.
    """
    if plan.kv_index.numel() > len(key):  # else nothing is shared: every node's keys are its own rows, in order
        key, value = (_Gathered.apply(tensor, plan.kv_index) for tensor in (key, value))
    if window is not None and window >= plan.max_k:
        window = None
    return kernel.attend(query, key, value, plan, scaling, window, softcap)


class _Gathered(torch.autograd.Function):
    """Rows of a line, by index.  A shared row's gradients are added up in float32 at least: there may be hundreds."""

    @staticmethod
    def forward(ctx: Any, line: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(line)
        return line.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros(ctx.rows, *gradient.shape[1:], dtype=dtype, device=gradient.device)
        return total.index_add_(0, index, gradient.to(dtype)).to(gradient.dtype), None


def naive_ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scaling: float | None = None,
    window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The twin of every kernel: node by node, in the tensors' own precision.  [L, H, v]"""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for node in range(len(plan.cu_q) - 1):
        rows = slice(int(plan.cu_q[node]), int(plan.cu_q[node + 1]))
        picked = plan.kv_index[int(plan.cu_k[node]) : int(plan.cu_k[node + 1])]
        scores = torch.einsum("qhd,khd->hqk", query[rows], key[picked]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        # The last query stands at the last key, the one before it at the one before, ...
        ends = len(picked) - scores.shape[1] + torch.arange(scores.shape[1], device=query.device)[:, None]
        places = torch.arange(len(picked), device=query.device)
        visible = places <= ends if window is None else (places <= ends) & (places > ends - window)
        scores = scores.masked_fill(~visible, -torch.inf)
        if s_aux is not None:
            scores = torch.cat((scores, s_aux[:, None, None].expand(*scores.shape[:2], 1)), dim=-1)
        weights = scores.softmax(-1)[..., : len(picked)]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[picked]))
    return torch.cat(outputs)


# ---------------------------------------------------------------------------------------------------------------
# The proof of a kernel
# ---------------------------------------------------------------------------------------------------------------


def sample_plan(device: torch.device | str = "cpu") -> AttentionPlan:
    """Two trees: nodes with few and many ancestors' keys, shorter and longer than a kernel's tiles of 64 and 128."""
    starts = [sum(SIZES[:node]) for node in range(len(SIZES) + 1)]
    chains: list[list[int]] = []
    for node, parent in enumerate(PARENTS):
        own = list(range(starts[node], starts[node + 1]))
        chains.append(own if parent < 0 else [*chains[parent], *own])
    ends = [sum(map(len, chains[:node])) for node in range(len(SIZES) + 1)]
    return AttentionPlan(
        cu_q=torch.tensor(starts, dtype=torch.int32, device=device),
        cu_k=torch.tensor(ends, dtype=torch.int32, device=device),
        kv_index=torch.tensor([row for chain in chains for row in chain], device=device),
        max_q=max(SIZES),
        max_k=max(map(len, chains)),
        groups=(),
    )


def disproof(kernel: Kernel, call: Call, dtype: torch.dtype, device: torch.device) -> str:
    """What a kernel does otherwise than :func:`naive_ragged_attention` on one small line; empty where nothing.

    Outputs and gradients, against the twin in float32 on the same low-precision numbers.
    """
    plan = sample_plan(device)
    generator = torch.Generator().manual_seed(0)
    length, heads = sum(SIZES), 2 * call.shared
    shapes = ((length, heads, call.head_dim), *((length, 2, call.head_dim),) * 2, (length, heads, call.head_dim))
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    options: dict[str, Any] = {
        "scaling": call.own_scale, "window": WINDOW if call.windowed else None, "softcap": CAP if call.capped else None,
    }  # fmt: skip
    try:
        with torch.enable_grad():
            q, k, v = (tensor.detach().requires_grad_() for tensor in made[:3])
            found = ragged_attention(q, k, v, plan, kernel, **options)
            found_gradients = torch.autograd.grad(found, (q, k, v), made[3])
            q, k, v = (tensor.detach().float().requires_grad_() for tensor in made[:3])
            expected = naive_ragged_attention(q, k, v, plan, **options)
            expected_gradients = torch.autograd.grad(expected, (q, k, v), made[3].float())
    except Exception as error:  # whatever a kernel raises, it is not for this device
        return f"{kernel.name} fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    names = ("outputs", "gradients of queries", "gradients of keys", "gradients of values")
    pairs = zip((found, *found_gradients), (expected, *expected_gradients), strict=True)
    for name, (one, other) in zip(names, pairs, strict=True):
        apart = ((one.float() - other).norm() / other.norm()).item()
        if not apart <= TOLERANCE:
            return f"{kernel.name}: {name} differ by {apart:.1g} from the plain computation"
    return ""
