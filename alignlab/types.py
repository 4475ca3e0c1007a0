"""The types that every floor shares: shapes and names, no behaviour.

Dimensions used in the comments: ``B`` rows and ``L`` tokens a row of one micro-batch (``B`` is 1 in the layouts
``tree`` and ``packed``), ``N`` scored tokens, ``M`` target tokens counted once for each sequence they belong to
(``M >= N``, since one token of a shared prefix may be a target of several sequences), ``S`` sequences, ``P`` pairs.
A *flat row* is an index into ``[B * L]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:  # processes that only encode rows do without torch, which takes a second to import
    from torch import Tensor

Message = dict[str, Any]
"""One chat turn: ``role``, ``content`` and, where the source has them, ``tool_calls``, ``reasoning_content``, ..."""


class Unit(str, Enum):
    """What a loss is a sum over, and therefore what the loop divides it by.

    A step's totals are sums of weights: of its pairs; of its sequences; for ``TOKEN`` of each sequence's weight times
    its number of targets, and where the examples are pairs, of each pair's weight times the number of targets of its
    chosen sequence (the negative log-likelihood term of orpo and dpo+sft runs over those).
    """

    TOKEN = "token"
    SEQUENCE = "sequence"
    PAIR = "pair"


# ---------------------------------------------------------------------------------------------------------------
# Rows, before the tokenizer
# ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sequence:
    """One path from the root of a row's tree to a leaf: a context and the turns that follow it.

    Exactly one of three forms is filled.  *Conversation*: ``prompt`` and ``completion`` are message lists; every
    assistant turn of ``completion`` is a target (its terminator included), nothing in ``prompt`` is.  *Plain text*:
    both are strings; the completion and one end-of-sequence token are targets.  *Tokens*: ``input_ids`` and
    ``target_mask`` (same length), for rows that were tokenised elsewhere.
    """

    prompt: list[Message] | str | None = None
    completion: list[Message] | str | None = None
    input_ids: list[int] | None = None
    target_mask: list[bool] | None = None
    label: bool | None = None
    """Desirable or not, for unpaired preference (KTO)."""
    scores: dict[str, float] = field(default_factory=dict)
    """Ratings by dimension, e.g. ``{"helpfulness": 5.0}``; the overall one, where a source has it, is ``overall``."""
    weight: float = 1.0


@dataclass(slots=True)
class Pair:
    """Two sequences of one row (indices into ``Sample.sequences``), the first preferred."""

    chosen: int
    rejected: int
    margin: float = 0.0
    absolute: bool = False
    """Whether the Eurus objective's absolute terms apply to this pair."""
    weight: float = 1.0


@dataclass(slots=True)
class Sample:
    """One row as it was understood: a prompt tree given as its paths.

    What a function registered with ``register_format`` returns.  ``tools`` is handed to the chat template;
    ``verify`` holds what a verifier needs to judge a completion of this prompt.
    """

    sequences: list[Sequence]
    pairs: list[Pair] = field(default_factory=list)
    id: str = ""
    source: str = ""
    tools: list[Any] | None = None
    verify: dict[str, Any] = field(default_factory=dict)
    category: str = ""
    """what figures are given by (a benchmark's subset, a task), where the row says"""


# ---------------------------------------------------------------------------------------------------------------
# Rows, after the tokenizer
# ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class EncodedSequence:
    """``tokens`` int32 [n] and ``target`` bool [n]: which of them are predicted.  ``target[0]`` is always False."""

    tokens: np.ndarray
    target: np.ndarray
    roles: np.ndarray | None = None
    """uint8 [n]: whose words each token is (``data.masks.ROLES``); for the account only, no index holds it"""


@dataclass(slots=True)
class EncodedSample:
    """One row in tokens.  ``sequence_values`` [S] and ``pair_values`` [P] hold every number attached to it.

    Always present: ``weight`` in both.  Where the data has them: ``label`` (1.0 / 0.0), ``score/<dimension>`` in
    ``sequence_values``; ``margin``, ``absolute`` in ``pair_values``.
    """

    id: str
    source: str
    sequences: list[EncodedSequence]
    pairs: np.ndarray
    """int32 [P, 2]: (chosen, rejected), indices into ``sequences``."""
    sequence_values: dict[str, np.ndarray]
    pair_values: dict[str, np.ndarray]
    category: str = ""


# ---------------------------------------------------------------------------------------------------------------
# Micro-batches
# ---------------------------------------------------------------------------------------------------------------


class AttentionGroup(NamedTuple):
    """Nodes of similar shape, padded together: one attention call serves them all.

    ``queries`` [b, q] and ``keys`` [b, k] are rows of the packed line; padding repeats row 0 of the line.
    ``mask`` [b, 1, q, k] is True where a query may look (ancestors and itself, causal); a padded query looks at key
    0 so that no softmax is empty, and its output is thrown away through ``valid`` [b, q].  ``key_depth`` [b, k] and
    ``query_depth`` [b, q] are positions on the path: a sliding window is counted on them.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    valid: Tensor
    query_depth: Tensor
    key_depth: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionNodes:
    """A plan as the host walks it, one attention call a node.  No tuple, so that hooks which walk tuples pass by."""

    sizes: tuple[int, ...]
    """rows of the line that each node owns, in the line's order"""
    paths: tuple[tuple[int, ...], ...]
    """for each node the nodes that it sees: its ancestors, root first, and itself"""
    masks: tuple[Tensor | None, ...]
    """bool [q, k] of each node, causal from the bottom-right corner; None for a root, which is causal and square"""


class AttentionPlan(NamedTuple):
    """Who may look at whom in one packed line of prompt trees: the ancestors' tokens and one's own.

    The ragged form is what variable-length kernels take: node i's queries are rows ``cu_q[i]:cu_q[i+1]`` of the
    line, its keys are ``kv_index[cu_k[i]:cu_k[i+1]]``, causal from the bottom-right corner.  For kernels that have no
    ragged form the same stands there once more: as padded calls in ``groups``, or call by call in ``nodes``.
    """

    cu_q: Tensor
    cu_k: Tensor
    kv_index: Tensor
    max_q: int
    max_k: int
    groups: tuple[AttentionGroup, ...]
    nodes: AttentionNodes | None = None


class PackedBatch(NamedTuple):
    """One micro-batch.  A NamedTuple, because the hooks of ZeRO-3 walk tuples and not dataclasses."""

    input_ids: Tensor
    """int64 [B, L]"""
    position_ids: Tensor
    """int64 [B, L]: depth on the path from the root"""
    attention_mask: Tensor | None
    """int64 [B, L] in the layout ``rows``, else None"""
    plan: AttentionPlan | None
    """in the layouts ``tree`` and ``packed``, else None"""
    scored: Tensor
    """int64 [N]: flat row whose hidden state predicts the target"""
    targets: Tensor
    """int64 [N]: the token to predict"""
    target_rows: Tensor
    """int64 [N]: flat row at which the target itself stands (where IFT mixes its input)"""
    seq_ptr: Tensor
    """int64 [S + 1]: sequence s owns ``seq_idx[seq_ptr[s]:seq_ptr[s + 1]]``"""
    seq_idx: Tensor
    """int64 [M]: into the scored tokens, in path order"""
    seq_of: Tensor
    """int64 [M]: the sequence each entry of ``seq_idx`` belongs to"""
    depth: Tensor
    """int64 [M]: position on the path of each entry of ``seq_idx``"""
    last: Tensor
    """int64 [S]: flat row of the last token of each sequence (where a scalar head reads)"""
    pairs: Tensor
    """int64 [P, 2]: (chosen, rejected), into the sequences"""
    sequence_values: dict[str, Tensor]
    """[S] each: ``weight``, ``label``, ... in float32; ``reference`` (summed reference log-probability) in float64"""
    pair_values: dict[str, Tensor]
    """float32 [P] each: ``weight``, ``margin``, ``absolute``, ..."""
    sequence_ids: Tensor
    """int64 [S]: the sequences' numbers in the index (keys of per-token draws and of cached numbers)"""
    weight: float
    """1.0, or 0.0 for a filler that only keeps the ranks in step"""


class Mix(NamedTuple):
    """Input embeddings of target tokens replaced by ``(1 - lambda_) E(target) + lambda_ E(residual)`` (IFT eq. 17)."""

    residual: Tensor
    """int64 [N]: the token mixed in at ``target_rows[n]``"""
    lambda_: float
    frozen_embeddings: bool = False
    """True: no gradient reaches the input embeddings (the released code's frozen copy)"""


class Ask(NamedTuple):
    """What an objective wants from one forward pass."""

    want: str = "logps"
    """``logps`` | ``greedy`` | ``sample`` | ``reward``"""
    mix: Mix | None = None
    seed: int = 0
    """for ``sample``: key of the draw, mixed with sequence id and position"""


class Scores(NamedTuple):
    """What came back; only what was asked for is filled.  Log-probabilities and rewards are at least float32."""

    logps: Tensor | None = None
    """[N]: log-probability of each scored token"""
    tokens: Tensor | None = None
    """int64 [N]: for ``greedy`` the most probable token at each scored place, for ``sample`` a drawn one"""
    rewards: Tensor | None = None
    """[S]: the scalar head at ``last``"""


class Stat(NamedTuple):
    """A mean in the making: ``total / weight``, both tensors on the device; stats add by component."""

    total: Tensor
    weight: Tensor


class LossOutput(NamedTuple):
    """``sums`` holds SUMS over each unit, never means: the loop alone divides, by the whole optimizer step's count."""

    sums: dict[Unit, Tensor]
    stats: dict[str, Stat]
    margins: Tensor | None = None
    """[P], detached: by how much each pair's chosen side is preferred, where an objective learns preferences"""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What an objective may know of the step it stands in; every random draw is keyed by it, not by ranks.

    ``statistics`` holds, where the objective declares ``step_statistics``, the values of all examples of the step,
    gathered over micro-batches and ranks (1-D tensors).  ``totals`` are the divisors.  ``state`` is the objective's
    memory between steps as numbers (written into checkpoints); only ``end_of_step`` may change it.
    """

    step: int
    total_steps: int
    warmup_steps: int
    seed: int
    totals: Mapping[Unit, float]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)
    training: bool = True


Score = Callable[[PackedBatch, Ask], Scores]


@runtime_checkable
class Objective(Protocol):
    """A loss.  It owns no loop, optimizer, loader or reducer: it turns scores into sums and statistics.

    Class attributes: ``name``; ``units`` it divides by; ``example``, what the global batch counts (``PAIR`` or
    ``SEQUENCE``); ``head`` ``"lm"`` or ``"scalar"``; ``mixes_inputs`` (then the trie's key includes is-target);
    ``Config``, a dataclass.  ``needs_reference`` may be a property of the configured instance.
    Optional: ``step_statistics(score, batch, context) -> {name: values [n]}`` under no_grad before the step, and
    ``mismatched`` (KTO: rows get a partner's completion as an extra sequence in that pass).
    """

    name: str
    units: tuple[Unit, ...]
    example: Unit
    head: str
    needs_reference: bool
    mixes_inputs: bool
    mismatched: bool
    Config: type

    def __call__(self, score: Score, batch: PackedBatch, context: StepContext) -> LossOutput: ...


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What the optimizer step did: the gradient norm before clipping, and whether parameters were updated."""

    grad_norm: float
    updated: bool
