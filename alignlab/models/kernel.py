"""Which form of attention plan a model's packed lines get: ragged kernels, or padded groups.

Decided here and nowhere else, twice.  Before the model goes to its engine: do the kernels of this device take every
attention call that the model makes?  With the model on the device: do both forms give the same numbers on one line?
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignlab.data.pack import batch_of, to_device
from alignlab.errors import ConfigError
from alignlab.models.proof import REAL_TOLERANCE, sequences, small_copy
from alignlab.models.scorer import backbone, select_attention
from alignlab.ops import attention, ragged
from alignlab.ops.ragged_kernels import Call
from alignlab.types import Ask, PackedBatch, Score

SCALE = 64
"""Of the rows of the comparison: paths of some 450 tokens, longer than the tiles of any kernel."""


def takes_ragged(model: Any, layout: str, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """(whether all attention of ``model`` in this layout has a ragged kernel, the kernel or the reason why not).

    The reason is empty where there is nothing to say: in the layout ``rows``, and on a CPU.
    """
    if layout == "rows" or device.type != "cuda":
        return False, ""
    calls = attention_calls(model)
    return (False, "no small copy shows its attention calls") if calls is None else ragged.choose(calls, dtype, device)


@torch.no_grad()
def attention_calls(model: Any) -> frozenset[Call] | None:
    """What the layers of a small copy of ``model`` ask of their attention; None where no copy can be made."""
    batch = batch_of(sequences(), "tree")
    for narrow in (True, False):
        try:
            small = small_copy(model, narrow)
            select_attention(small, attention.NAME)
            calls: set[Call] = set()
            backbone(small)(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, tree_plan=batch.plan,
                tree_calls=calls, attention_mask=attention.no_mask(batch.input_ids),
            )  # fmt: skip
            return frozenset(calls)
        except Exception:  # whatever a family's code raises: the layout is proved, only the kernel stays unknown
            continue
    return None


def comparison_batch(model: Any, layout: str, device: torch.device) -> PackedBatch:
    """The line on which both forms are compared, with its groups, on ``device``."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 8 * SCALE
    rows = sequences(config.vocab_size, scale=max(1, min(SCALE, longest // 8)))
    return to_device(batch_of(rows, layout), device)


@torch.no_grad()
def difference(score: Score, batch: PackedBatch, head: str) -> float:
    """Mean absolute difference of log-probabilities (or rewards) between the groups of a line and its ragged plan.

    The mean: in bfloat16 single numbers of a deep model are off by rounding alone.  That of rewards is a share of their
    mean magnitude, which is whatever the head makes it (``model.head_init_std``).  Infinity where no kernel serves a
    layer, which then asks for something else than the small copy's layers did.
    """
    assert batch.plan is not None
    one = _numbers(score, batch, head)
    try:
        other = _numbers(score, batch._replace(plan=batch.plan._replace(groups=())), head)
    except ConfigError:
        return float("inf")
    gap = (one.double() - other.double()).abs().mean()
    return (gap if head == "lm" else gap / one.double().abs().mean()).item()


def _numbers(score: Score, batch: PackedBatch, head: str) -> Tensor:
    scores = score(batch, Ask("logps" if head == "lm" else "reward"))
    found = scores.logps if head == "lm" else scores.rewards
    assert found is not None
    return found


def agrees(found: float, dtype: torch.dtype) -> bool:
    """Whether a :func:`difference` is rounding."""
    return found <= REAL_TOLERANCE[dtype]
