"""From a bin to one micro-batch of tensors, in one of three layouts.

``tree``: every item is a trie on one line, a shared prefix stands once.  ``packed``: every sequence is a node of its
own on one line, nothing shared, nothing padded.  ``rows``: one padded row a sequence.  All three hold the same
sequences in the same order with the same values, so an objective cannot tell them apart.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from alignlab.data import trie
from alignlab.data.bins import Bin, Item
from alignlab.data.index import Index
from alignlab.errors import ConfigError
from alignlab.types import AttentionGroup, AttentionNodes, AttentionPlan, EncodedSequence, PackedBatch

T = TypeVar("T")
R = TypeVar("R")

FORMS = ("padded", "nodes", "ragged")
"""How a plan says who looks at whom, besides the ragged form that all have: padded calls (any device), one call a node
(a CPU: no padding, no gathering of rows), nothing more."""
GROUP_WASTE = 1.25
"""A padded attention call computes at most so many times the area its nodes need ..."""
GROUP_SLACK = 4096
"""... and so many entries more: about what one call less saves."""
GROUP_AREA = 2**24
"""Entries of one padded call's mask at most; a longer node makes a call of its own."""


def pack(
    index: Index,
    bin: Bin,
    layout: str,
    *,
    mixes_inputs: bool = False,
    values: Mapping[str, Any] | None = None,
    select: str = "main",
    pad_id: int = 0,
    dtype: torch.dtype = torch.float32,
    merge_prompts: bool = False,
    form: str = "padded",
    max_length: int | None = None,
) -> PackedBatch:
    """One micro-batch on the CPU.

    Sequences stand in the order of the bin's items; ``depth`` is the position of the target token itself.  The values
    are the index's own, in ``dtype`` (float64 stays), and for ``select="main"`` those attached to it and ``values``:
    arrays over all stored sequences.

    ``select="mismatched"`` (KTO): each sequence is its prompt followed by its partner's completion, from the
    partner's first target on, with the partner's flags; at most ``max_length`` tokens, the completion's end is cut.
    ``sequence_ids`` and the index's own values stay those of the prompt's sequence, ``sequence_values["partner"]``
    (float64) is the partner's number, there are no pairs, and ``values`` holds mappings keyed (own, partner).

    ``merge_prompts`` puts items of equal prompts into one trie (layout ``tree``).  ``form`` is the attention plan's,
    one of ``FORMS``.

    Raises ConfigError for an unknown layout, ValueError for an item without partners.
    """
    numbers = np.array([number for item in bin.items for number in item.sequences], dtype=np.int64)
    owners = [place for place, item in enumerate(bin.items) for _ in item.sequences]
    looked_up = {name: array[numbers] for name, array in index.sequence_values.items()}
    extra: dict[str, Tensor] = {}
    if select == "main":
        sequences = [index.sequence(number) for number in numbers.tolist()]
        looked_up |= {name: array[numbers] for name, array in (index.attached | dict(values or {})).items()}
    elif select == "mismatched":
        if any(item.partners is None for item in bin.items):
            raise ValueError("the plan was made without mismatched=True: its items have no partners")
        partners = [number for item in bin.items for number in item.partners or ()]
        both = list(zip(numbers.tolist(), partners, strict=True))
        sequences = [_mismatched(index, own, other, max_length) for own, other in both]
        looked_up |= {
            name: np.array([table[pair] for pair in both], dtype=np.float64) for name, table in (values or {}).items()
        }
        extra["partner"] = torch.tensor(partners, dtype=torch.float64)
    else:
        raise ValueError(f"select is 'main' or 'mismatched', not '{select}'")

    if layout == "rows":
        shape = _rows(sequences, pad_id)
    elif layout in ("tree", "packed"):
        if layout == "packed":
            sharing: list[int] = list(range(len(sequences)))
        elif merge_prompts:
            sharing = _by_prompt(index, bin.items, owners)
        else:
            sharing = owners
        shape = _line(trie.build(sequences, mixes_inputs, sharing), form)
    else:
        raise ConfigError(f"model.layout: '{layout}' is none of tree, packed, rows")

    pairs, pair_numbers = _pairs(index, bin.items) if select == "main" else (np.zeros((0, 2), np.int64), numbers[:0])
    return PackedBatch(
        **shape,
        pairs=torch.from_numpy(pairs),
        sequence_values={
            # What was computed for the rows (sums of log-probabilities) keeps its float64.
            name: torch.as_tensor(array, dtype=torch.float64 if array.dtype == np.float64 else dtype)
            for name, array in looked_up.items()
        }
        | extra,
        pair_values={
            name: torch.as_tensor(array[pair_numbers], dtype=dtype) for name, array in index.pair_values.items()
        },
        sequence_ids=torch.from_numpy(numbers),
        weight=bin.weight,
    )


def batch_of(
    sequences: list[EncodedSequence], layout: str, *, mixes_inputs: bool = False, form: str = "padded"
) -> PackedBatch:
    """A micro-batch of bare sequences, without an index (what proofs and tests of a layout need)."""
    count = len(sequences)
    if layout == "rows":
        shape = _rows(sequences, 0)
    else:
        shape = _line(trie.build(sequences, mixes_inputs, range(count) if layout == "packed" else None), form)
    return PackedBatch(
        **shape,
        pairs=torch.zeros((0, 2), dtype=torch.int64),
        sequence_values={"weight": torch.ones(count)},
        pair_values={"weight": torch.ones(0)},
        sequence_ids=torch.arange(count),
        weight=1.0,
    )


def _mismatched(index: Index, own: int, other: int, max_length: int | None) -> EncodedSequence:
    prompt, completion = int(index.prompt_lengths[own]), int(index.prompt_lengths[other])
    a, b = index.sequence(own), index.sequence(other)
    tokens = np.concatenate((a.tokens[:prompt], b.tokens[completion:]))[:max_length]
    target = np.concatenate((np.zeros(prompt, dtype=bool), b.target[completion:]))[:max_length]
    return EncodedSequence(tokens, target)


def _by_prompt(index: Index, items: Iterable[Item], owners: list[int]) -> list[int]:
    """A number for each sequence: equal for those of items with equal prompts."""
    groups: dict[int, int] = {}
    of_item = [groups.setdefault(int(index.prompt_hash[item.sample]), len(groups)) for item in items]
    return [of_item[owner] for owner in owners]


def _pairs(index: Index, items: Iterable[Item]) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [P, 2] places in the batch, int64 [P] stored numbers)."""
    places, begun = [np.zeros((0, 2), dtype=np.int64)], 0
    numbers: list[int] = []
    for item in items:
        members = index.pairs[list(item.pairs)] + index.sample_ptr[item.sample]
        places.append(begun + np.searchsorted(item.sequences, members).astype(np.int64).reshape(-1, 2))
        numbers.extend(item.pairs)
        begun += len(item.sequences)
    return np.concatenate(places), np.array(numbers, dtype=np.int64)


def _line(tree: trie.Trie, form: str) -> dict[str, Any]:
    """The fields of a batch whose sequences stand on one line."""
    number_of_row = np.cumsum(tree.target) - 1
    rows = np.flatnonzero(tree.target)
    return {
        "input_ids": torch.from_numpy(tree.tokens.astype(np.int64))[None],
        "position_ids": torch.from_numpy(tree.depth)[None],
        "attention_mask": None,
        "plan": attention_plan(tree, form),
        **_scored(tree.previous[rows], tree.tokens[rows], rows),
        **_entries(tree.seq_ptr, number_of_row[tree.seq_rows], tree.depth[tree.seq_rows]),
        "last": torch.from_numpy(tree.last),
    }


def _rows(sequences: list[EncodedSequence], pad_id: int) -> dict[str, Any]:
    """The fields of a batch with one padded row a sequence."""
    lengths = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.int64)
    count, width = len(sequences), int(lengths.max())
    real = np.arange(width) < lengths[:, None]
    ids = np.full((count, width), pad_id, dtype=np.int64)
    target = np.zeros((count, width), dtype=bool)
    ids[real] = np.concatenate([sequence.tokens for sequence in sequences])
    target[real] = np.concatenate([sequence.target for sequence in sequences])
    rows = np.flatnonzero(target)
    seq_ptr = np.concatenate(([0], np.cumsum(target.sum(1))))
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(np.tile(np.arange(width), (count, 1))),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
        "plan": None,
        **_scored(rows - 1, ids.reshape(-1)[rows], rows),
        **_entries(seq_ptr, np.arange(len(rows)), rows % width),
        "last": torch.from_numpy(np.arange(count) * width + lengths - 1),
    }


def _scored(scored: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> dict[str, Tensor]:
    return {
        "scored": torch.from_numpy(scored),
        "targets": torch.from_numpy(targets.astype(np.int64)),
        "target_rows": torch.from_numpy(rows),
    }


def _entries(seq_ptr: np.ndarray, seq_idx: np.ndarray, depth: np.ndarray) -> dict[str, Tensor]:
    return {
        "seq_ptr": torch.from_numpy(seq_ptr),
        "seq_idx": torch.from_numpy(seq_idx),
        "seq_of": torch.from_numpy(np.repeat(np.arange(len(seq_ptr) - 1), np.diff(seq_ptr))),
        "depth": torch.from_numpy(depth),
    }


# ---------------------------------------------------------------------------------------------------------------
# Who may look at whom
# ---------------------------------------------------------------------------------------------------------------


def attention_plan(tree: trie.Trie, form: str = "padded") -> AttentionPlan:
    """The attention plan of a line of tries in one of ``FORMS``: nodes are its ragged rows, in the line's order."""
    if form not in FORMS:
        raise ValueError(f"form is one of {', '.join(FORMS)}, not '{form}'")
    key_ptr, key_rows = tree.keys()
    queries, keys = np.diff(tree.node_ptr), np.diff(key_ptr)
    return AttentionPlan(
        cu_q=torch.from_numpy(tree.node_ptr.astype(np.int32)),
        cu_k=torch.from_numpy(key_ptr.astype(np.int32)),
        kv_index=torch.from_numpy(key_rows),
        max_q=int(queries.max(initial=0)),
        max_k=int(keys.max(initial=0)),
        groups=_groups(tree, key_ptr, key_rows) if form == "padded" else (),
        nodes=_nodes(tree, queries, keys) if form == "nodes" else None,
    )


def plain_form(device: torch.device) -> str:
    """Of ``FORMS`` the one for torch's own kernel: on a CPU a call costs less than padding, on a GPU much more."""
    return "nodes" if device.type == "cpu" else "padded"


def _nodes(tree: trie.Trie, queries: np.ndarray, keys: np.ndarray) -> AttentionNodes:
    masks = [
        None if parent < 0 else torch.ones(q, k, dtype=torch.bool).tril_(k - q)
        for q, k, parent in zip(queries.tolist(), keys.tolist(), tree.parent.tolist(), strict=True)
    ]
    return AttentionNodes(tuple(queries.tolist()), tuple(map(tuple, tree.chains())), tuple(masks))


def _groups(tree: trie.Trie, key_ptr: np.ndarray, key_rows: np.ndarray) -> tuple[AttentionGroup, ...]:
    """Padded calls, each node in one of them."""
    queries, keys = np.diff(tree.node_ptr), np.diff(key_ptr)
    members: list[list[int]] = []
    sizes: list[tuple[int, int, int]] = []  # most queries, most keys, area needed
    for node in np.lexsort((queries, keys))[::-1].tolist():
        q, k = int(queries[node]), int(keys[node])
        for place, (most_q, most_k, area) in enumerate(sizes):
            padded = (len(members[place]) + 1) * max(most_q, q) * max(most_k, k)
            if padded <= min(GROUP_WASTE * (area + q * k) + GROUP_SLACK, GROUP_AREA):
                members[place].append(node)
                sizes[place] = (max(most_q, q), max(most_k, k), area + q * k)
                break
        else:
            members.append([node])
            sizes.append((q, k, q * k))
    return tuple(_group(tree, np.array(nodes), key_ptr, key_rows) for nodes in members)


def _group(tree: trie.Trie, nodes: np.ndarray, key_ptr: np.ndarray, key_rows: np.ndarray) -> AttentionGroup:
    queries, keys = tree.node_ptr[nodes + 1] - tree.node_ptr[nodes], key_ptr[nodes + 1] - key_ptr[nodes]
    real_q = np.arange(queries.max()) < queries[:, None]
    real_k = np.arange(keys.max()) < keys[:, None]
    query_rows, rows_of_keys = np.zeros(real_q.shape, dtype=np.int64), np.zeros(real_k.shape, dtype=np.int64)
    query_rows[real_q] = trie.ranges(tree.node_ptr[nodes], tree.node_ptr[nodes + 1])
    rows_of_keys[real_k] = key_rows[trie.ranges(key_ptr[nodes], key_ptr[nodes + 1])]
    # A node's last query sees all its keys, the one before it all but one, ...; a padded query sees key 0 alone.
    sees = np.where(real_q, (keys - queries)[:, None] + np.arange(queries.max()), 0)
    mask = np.arange(keys.max()) <= sees[:, :, None]
    return AttentionGroup(
        queries=torch.from_numpy(query_rows),
        keys=torch.from_numpy(rows_of_keys),
        mask=torch.from_numpy(mask[:, None]),
        valid=torch.from_numpy(real_q),
        query_depth=torch.from_numpy(tree.depth[query_rows] * real_q),
        key_depth=torch.from_numpy(tree.depth[rows_of_keys] * real_k),
    )


def dense_mask(plan: AttentionPlan, length: int) -> Tensor:
    """bool [length, length]: the ragged plan written out, query by query (the naive twin of every attention path)."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for node in range(len(plan.cu_q) - 1):
        first, end = int(plan.cu_q[node]), int(plan.cu_q[node + 1])
        keys = plan.kv_index[int(plan.cu_k[node]) : int(plan.cu_k[node + 1])]
        for row in range(first, end):
            mask[row, keys[: len(keys) - (end - 1 - row)]] = True
    return mask


# ---------------------------------------------------------------------------------------------------------------
# On the way to the device
# ---------------------------------------------------------------------------------------------------------------


def to_device(batch: PackedBatch, device: torch.device | str) -> PackedBatch:
    """The same batch with every tensor on ``device``; on the CPU the batch itself."""
    device = torch.device(device)
    return batch if device.type == "cpu" else _each(batch, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(batch: PackedBatch) -> PackedBatch:
    """The same batch in memory from which a GPU copies by itself: from other memory a copy makes the host wait."""
    return _each(batch, Tensor.pin_memory)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each(entry, change) for name, entry in value.items()}
    if isinstance(value, tuple):
        changed = [_each(entry, change) for entry in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    return value


class Prefetcher(Generic[T, R]):
    """``map(make, items)``, computed up to ``ahead`` results early in a background thread, in order.

    An exception in the thread is raised in the consumer, at the place of the result it prevented.  ``close`` (or the
    end of a ``with`` block) stops the thread and waits for it.
    """

    def __init__(self, items: Iterable[T], make: Callable[[T], R], ahead: int = 2) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(iter(items), make), name="packing", daemon=True)
        self._thread.start()

    def _work(self, items: Iterator[T], make: Callable[[T], R]) -> None:
        try:
            for item in items:
                self._queue.put(("result", make(item)))
                if self._stop.is_set():
                    return
            self._queue.put(("end", None))
        except BaseException as error:
            self._queue.put(("error", error))

    def __iter__(self) -> Iterator[R]:
        while not self._stop.is_set():
            kind, value = self._queue.get()
            if kind == "result":
                yield value
                continue
            self.close()
            if kind == "error":
                raise value

    def close(self) -> None:
        """Stop early, or clean up; safe to call twice."""
        self._stop.set()
        with suppress(queue.Empty):
            while True:  # the thread may be waiting for room; it puts one result more at most
                self._queue.get_nowait()
        self._thread.join()

    def __enter__(self) -> Prefetcher[T, R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
