"""From hidden states to log-probabilities, greedy tokens or drawn ones, without a [N, V] tensor.

The vocabulary product runs over chunks of rows.  Where gradients are wanted and there is more than one chunk, each
chunk is recomputed in the backward pass, so at any moment one chunk's logits are alive.  Softmaxes are at least
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24
"""Logits in one chunk: 64 MiB in float32."""


class LogitTransform(NamedTuple):
    """What a family does to its logits: ``cap * tanh(scale * x / cap)``, or ``scale * x`` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def chunked_logps(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """[N]: log-probability of ``targets`` [N] given ``hidden`` [N, H], for an output layer ``weight`` [V, H]."""
    return _over_chunks(_logps, hidden, (targets,), weight, bias, transform, chunk)


def naive_logps(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None, transform: LogitTransform | None = None
) -> Tensor:
    """The twin of :func:`chunked_logps`: all logits at once."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (transform or LogitTransform())(logits).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@torch.no_grad()
def chunked_argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """int64 [N]: the most probable token (scaling up and capping keep the order)."""
    return _over_chunks(_argmax, hidden, (), weight, bias, None, chunk)


@torch.no_grad()
def chunked_sample(
    hidden: Tensor,
    uniforms: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """int64 [N]: one token a row from its distribution, by inverting the cumulative one at ``uniforms`` [N] in [0, 1).

    Which token is drawn depends on the row and its number alone, and not on what is computed beside it.
    """
    return _over_chunks(_sample, hidden, (uniforms,), weight, bias, transform, chunk)


def _over_chunks(
    function: Callable[..., Tensor],
    hidden: Tensor,
    by_row: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform | None,
    chunk: int,
) -> Tensor:
    rows = max(1, chunk // weight.shape[0])
    many = len(hidden) > rows
    compute = partial(function, transform=transform or LogitTransform())
    if many and torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    pieces = [compute(*part, weight, bias) for part in _split((hidden, *by_row), rows)]
    return torch.cat(pieces) if many else pieces[0]


def _split(tensors: tuple[Tensor, ...], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """At least one piece, so that an empty batch still reaches the weight's gradient (with zeros)."""
    for start in range(0, max(1, len(tensors[0])), rows):
        yield tuple(tensor[start : start + rows] for tensor in tensors)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _logps(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, *, transform: LogitTransform
) -> Tensor:
    logits = _logits(hidden, weight, bias, transform)
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, transform: LogitTransform) -> Tensor:
    return F.linear(hidden, weight, bias).argmax(-1)


def _sample(
    hidden: Tensor, uniforms: Tensor, weight: Tensor, bias: Tensor | None, *, transform: LogitTransform
) -> Tensor:
    cumulative = _logits(hidden, weight, bias, transform).double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None].double() * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp(max=weight.shape[0] - 1)


# ---------------------------------------------------------------------------------------------------------------
# Random numbers without a state
# ---------------------------------------------------------------------------------------------------------------


def scramble(keys: Tensor) -> Tensor:
    """int64 -> int64: the finalizer of SplitMix64 (Steele, Lea, Flood 2014), modulo 2^64; a bijection."""
    keys = (keys ^ _right(keys, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    keys = (keys ^ _right(keys, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return keys ^ _right(keys, 31)


def uniforms(keys: Tensor, seed: int) -> Tensor:
    """float64 [N] in [0, 1): a function of ``(seed, keys[n])`` alone."""
    start = torch.tensor(seed * 0x9E3779B97F4A7C15 & (2**63 - 1), dtype=torch.int64, device=keys.device)
    return _right(scramble(keys + scramble(start)), 11).double() * 2.0**-53


def _right(keys: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)
