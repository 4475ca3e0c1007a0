"""Attention over one packed line of prompt trees: every token sees its ancestors and itself.

Registered with transformers as the attention function ``alignlab_tree``, so model code stays untouched.  The plan
arrives as the keyword ``tree_plan`` of the model's forward and not through a global: what a checkpointed layer needs
when it is recomputed in the backward pass has to travel with its arguments.

Exact for softmax attention with any scale, grouped heads, soft-capped scores, attention sinks and sliding windows
(counted on the path).  An argument that is not known here is refused, because ignoring it would change numbers.

The plan says how it is computed: with padded ``groups`` by one masked call of torch's kernel for each (any device, any
dtype), with ``nodes`` by one call for each of them (a CPU, where a call costs little), with neither by a ragged kernel
(``ops.ragged``: CUDA, bfloat16 or float16).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from alignlab.errors import ConfigError
from alignlab.ops import ragged
from alignlab.ops.ragged_kernels import Call, call_of
from alignlab.types import AttentionGroup, AttentionNodes, AttentionPlan

NAME = "alignlab_tree"

HARMLESS = frozenset(
    {
        "cache_position", "is_causal", "labels", "logits_to_keep", "num_items_in_batch", "output_attentions",
        "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict",
        "use_cache",
    }
)  # fmt: skip
"""Arguments of transformers' models that a plan answers already, or that no attention function reads."""


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree_plan: AttentionPlan | None = None,
    tree_calls: set[Call] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: ``query`` [B, H, L, d], ``key`` [B, G, L, d], ``value`` [B, G, L, v].

    Returns ([B, L, H, v], None).  ``s_aux`` [H] are the logits of the sinks.  ``sliding_window``: a key is visible
    while it is fewer positions away, on the path.  Without a plan (a padded batch, generation) ``attention_mask``
    [B, 1, L, K] decides, as in transformers' own functions.  ``tree_calls`` collects what the layers ask for.

    Raises ConfigError for dropout, for arguments that are unknown here, and when neither plan nor mask arrives.
    """
    if dropout:
        raise ConfigError(f"attention dropout is {dropout}; it has to be 0 in the layouts tree and packed")
    unknown = sorted(n for n, v in others.items() if n not in HARMLESS and v is not None and v is not False)
    if others.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention; use model.layout=rows"
        )
    if tree_plan is None:
        if attention_mask is None or attention_mask.shape[-1] < key.shape[2]:  # no mask, or that of a packed line
            raise ConfigError(f"no attention plan reached {type(module).__name__}; use model.layout=rows")
        return _attend(query, key, value, attention_mask, scaling, softcap, s_aux).transpose(1, 2), None
    query, key, value = query[0], key[0], value[0]
    if tree_calls is not None:
        tree_calls.add(call_of(query, key, value, scaling, sliding_window, softcap, s_aux))
    if tree_plan.groups:
        return _grouped_attention(query, key, value, tree_plan, scaling, sliding_window, softcap, s_aux), None
    if tree_plan.nodes is not None:
        return _node_attention(query, key, value, tree_plan.nodes, scaling, sliding_window, softcap, s_aux), None
    call = call_of(query, key, value, scaling, sliding_window, softcap, s_aux)
    kernel, reason = ragged.kernel_for(call, query.dtype, query.device)
    if kernel is None:
        raise ConfigError(f"the attention plan has no padded groups, and there is no ragged kernel: {reason}")
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return ragged.ragged_attention(query, key, value, tree_plan, kernel, scaling, sliding_window, softcap)[None], None


def _grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """[1, L, H, v]: one padded call for each group of the plan.  Heads first in, rows first out."""
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    outputs, places = [], []
    for group in plan.groups:
        mask = group.mask
        if sliding_window is not None and sliding_window < plan.max_k:
            mask = mask & within_window(group, sliding_window)
        out = _attend(
            _rows(query, group.queries), _rows(key, group.keys), _rows(value, group.keys), mask, scaling, softcap, s_aux
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        # Padded queries are sent to a row past the end: picking the valid ones would make the host wait for the device.
        places.append(torch.where(group.valid, group.queries, len(query)).flatten())
    line = outputs[0].new_zeros(len(query) + 1, *outputs[0].shape[1:])
    return line.index_copy(0, torch.cat(places), torch.cat(outputs))[None, :-1]


def _node_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    nodes: AttentionNodes,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """[1, L, H, v]: one call for each node, whose queries and own keys are slices of the line.  Heads first in."""
    queries, keys, values = (tensor[None].split(nodes.sizes, dim=2) for tensor in (query, key, value))
    outputs = []
    for own, path, mask in zip(queries, nodes.paths, nodes.masks, strict=True):
        seen, read = (
            torch.cat([parts[node] for node in path], dim=2) if len(path) > 1 else parts[path[0]]
            for parts in (keys, values)
        )
        size, length = own.shape[2], seen.shape[2]
        if sliding_window is not None and sliding_window < length:
            mask = _causal(size, length) if mask is None else mask
            mask = mask & ~torch.ones_like(mask).tril_(length - size - sliding_window)
        outputs.append(_attend(own, seen, read, mask, scaling, softcap, s_aux))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _causal(queries: int, keys: int) -> Tensor:
    """bool [queries, keys]: the last query sees all keys, the one before it all but the last, ..."""
    return torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)


def _rows(line: Tensor, index: Tensor) -> Tensor:
    """[b, heads, n, d]: rows ``index`` [b, n] of ``line`` [L, heads, d]."""
    return line.index_select(0, index.flatten()).view(*index.shape, *line.shape[1:]).transpose(1, 2)


def within_window(group: AttentionGroup, window: int) -> Tensor:
    """bool [b, 1, q, k]: the key is fewer than ``window`` positions before the query on the path."""
    return (group.query_depth[:, :, None] - group.key_depth[:, None, :] < window)[:, None]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """[b, H, q, v]: softmax attention under ``mask`` (bool, or added to the scores; None: causal, as many keys)."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    if softcap is None and s_aux is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    if mask is None:
        mask = _causal(query.shape[2], key.shape[2])
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The least number and not -inf: a padded query may see nothing at all, and 0 times NaN would reach the others.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (scores + mask).clamp(min=lowest)
    if s_aux is not None:  # a sink takes its share of the probability and gives no value
        sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def naive_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float, depth: Tensor, window: int | None = None
) -> Tensor:
    """The twin of the plain case: one dense mask ``visible`` bool [L, L]; [H, L, d] in, [L, H, v] out."""
    if window is not None:
        visible = visible & (depth[:, None] - depth[None, :] < window)
    shared = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scores = (query @ key.transpose(1, 2) * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


def no_mask(line: Tensor) -> Tensor:
    """What a packed line gives to a model as its mask, on the device of ``line``: four dimensions, one entry.

    Transformers hands a mask of four dimensions on as it is.  Given none, it would look for packed rows in the
    positions, and the host would wait for the device in every forward.
    """
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=line.device)


def _mask(*, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
    """Mask function of transformers: none without a mask to start from, an explicit one for padded rows."""
    if attention_mask is None:
        return None
    return sdpa_mask(**{**arguments, "attention_mask": attention_mask, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _mask)
