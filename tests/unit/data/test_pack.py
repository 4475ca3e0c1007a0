"""Micro-batches against the sequences they were made of, and attention plans against their naive twin."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data import cache, trie
from alignlab.data.bins import Bin, Item
from alignlab.data.index import Index, IndexWriter
from alignlab.data.pack import (
    GROUP_SLACK,
    GROUP_WASTE,
    Prefetcher,
    attention_plan,
    batch_of,
    dense_mask,
    pack,
    to_device,
)
from alignlab.data.plan import sequential
from alignlab.errors import ConfigError
from alignlab.types import AttentionPlan, EncodedSample, EncodedSequence, PackedBatch, Unit


@st.composite
def samples(draw: st.DrawFn) -> list[EncodedSample]:
    """Samples over three token ids with any flags: shared, equal and continued sequences all occur."""
    made = []
    for number in range(draw(st.integers(1, 3))):
        sequences = []
        for _ in range(draw(st.integers(1, 4))):
            size = draw(st.integers(1, 7))
            tokens = np.array(draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)), np.int32)
            target = np.array([False, *draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))], bool)
            sequences.append(EncodedSequence(tokens, target))
        count = len(sequences)
        pairs = np.array([(a, b) for a in range(count) for b in range(count) if a < b], np.int32).reshape(-1, 2)
        values = {"weight": np.arange(count, dtype=float)}
        made.append(EncodedSample(str(number), "", sequences, pairs, values, {"margin": np.arange(len(pairs)) / 2}))
    return made


def naive(plan: AttentionPlan, paths: list[torch.Tensor], length: int) -> torch.Tensor:
    """[length, length]: on every path, each token sees those up to itself."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for path in paths:
        for place, row in enumerate(path.tolist()):
            mask[row, path[: place + 1]] = True
    return mask


def from_groups(plan: AttentionPlan, length: int) -> torch.Tensor:
    """The padded form written out: what is seen through ``mask``, brought home by ``queries``, once each."""
    line = torch.zeros(length, length, dtype=torch.int64)
    for group in plan.groups:
        seen = torch.zeros(*group.queries.shape, length, dtype=torch.int64)
        index = group.keys[:, None, :].expand(*group.queries.shape, -1)
        seen.scatter_add_(2, index, group.mask[:, 0].long())
        line.index_add_(0, group.queries[group.valid], seen[group.valid])
    return line


def paths_of(batch: PackedBatch) -> list[torch.Tensor]:
    """Each sequence's flat rows, recovered from the batch alone: from ``last`` back to the root."""
    if batch.plan is None:
        width = batch.input_ids.shape[1]
        return [torch.arange(int(last) // width * width, int(last) + 1) for last in batch.last]
    seen = dense_mask(batch.plan, batch.input_ids.shape[1])
    return [seen[int(last)].nonzero()[:, 0] for last in batch.last]


@settings(deadline=None, max_examples=60)
@given(samples(), st.sampled_from(["tree", "packed", "rows"]), st.booleans(), st.booleans(), st.booleans())
def test_every_sequence_comes_out_as_it_went_in(
    rows: list[EncodedSample], layout: str, mixes: bool, merge: bool, pairwise: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, patch.object(cache, "sync_where_possible"):
        with IndexWriter(Path(folder) / "index") as writer:
            for row in rows:
                writer.add(row)
            index = writer.close()
        unit = Unit.PAIR if pairwise and len(index.pairs) else Unit.SEQUENCE
        plan = sequential(index, unit=unit, token_budget=10**6, layout=layout, mixes_inputs=mixes)
        batch = pack(index, plan.bins[0], layout, mixes_inputs=mixes, merge_prompts=merge, pad_id=9)

        tokens, depth = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
        paths = paths_of(batch)
        if unit is Unit.SEQUENCE:
            assert batch.sequence_ids.tolist() == list(range(index.num_sequences))
            assert len(batch.pairs) == 0
        for place, (number, path) in enumerate(zip(batch.sequence_ids.tolist(), paths, strict=True)):
            own = index.sequence(number)
            assert tokens[path].tolist() == own.tokens.tolist()
            assert depth[path].tolist() == list(range(len(path)))
            entries = batch.seq_idx[batch.seq_ptr[place] : batch.seq_ptr[place + 1]]
            wanted = np.flatnonzero(own.target)
            assert batch.depth[batch.seq_of == place].tolist() == wanted.tolist()
            assert batch.target_rows[entries].tolist() == path[wanted].tolist()
            assert batch.scored[entries].tolist() == path[wanted - 1].tolist()
            assert batch.targets[entries].tolist() == own.tokens[wanted].tolist()
        assert len(batch.seq_idx) == batch.seq_ptr[-1]
        assert sorted(set(batch.seq_idx.tolist())) == list(range(len(batch.scored)))  # each once, none unused
        assert (
            batch.sequence_values["weight"].tolist()
            == index.sequence_values["weight"][batch.sequence_ids.numpy()].tolist()
        )
        if unit is Unit.PAIR:
            local = np.concatenate([row.pairs + index.sample_ptr[n] for n, row in enumerate(rows)])
            assert batch.sequence_ids[batch.pairs].tolist() == local.tolist()
            assert batch.pair_values["margin"].tolist() == index.pair_values["margin"].tolist()
        if batch.plan is not None:
            length = len(tokens)
            mask = dense_mask(batch.plan, length)
            assert torch.equal(mask, naive(batch.plan, paths, length))
            assert torch.equal(from_groups(batch.plan, length), mask.long())  # each key once
        else:
            assert batch.attention_mask is not None
            assert batch.attention_mask.sum(1).tolist() == [len(path) for path in paths]
            assert (batch.input_ids[batch.attention_mask == 0] == 9).all()
        if layout == "tree" and not merge and unit is Unit.SEQUENCE:
            assert len(tokens) == index.tree_tokens(mixes).sum()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100), st.integers(1, 15)), min_size=1, max_size=12))
def test_groups_are_few_and_waste_little(shapes: list[tuple[int, int, int]]) -> None:
    """Pairs of completions of very different lengths; what padding may cost, and what it must not change."""
    rng = np.random.default_rng(0)
    items, groups = [], []
    for place, (prompt, first, second) in enumerate(shapes):
        shared = rng.integers(0, 50, prompt)
        for size in (first, second):
            tokens = np.concatenate((shared, rng.integers(0, 50, size))).astype(np.int32)
            items.append(EncodedSequence(tokens, np.arange(len(tokens)) >= prompt))
            groups.append(place)
    tree = trie.build(items, False, groups)
    plan = attention_plan(tree)
    queries, keys = plan.cu_q.diff(), plan.cu_k.diff()
    for group in plan.groups:
        nodes = torch.searchsorted(plan.cu_q, group.queries[:, 0].contiguous(), right=True, out_int32=True) - 1
        needed = int((queries[nodes] * keys[nodes]).sum())
        assert group.mask.numel() <= GROUP_WASTE * needed + GROUP_SLACK
    assert sum(int(group.valid.sum()) for group in plan.groups) == len(tree.tokens)
    assert (plan.max_q, plan.max_k) == (int(queries.max()), int(keys.max()))
    assert torch.equal(from_groups(plan, len(tree.tokens)), dense_mask(plan, len(tree.tokens)).long())


def test_tiny_rows_share_calls_and_padding_is_harmless(make_index: Callable[..., Index]) -> None:
    index = make_index(200)
    bin = sequential(index, unit=Unit.SEQUENCE, token_budget=10**6).bins[0]
    plan = pack(index, bin, "tree").plan
    assert plan is not None
    assert len(plan.cu_q) > 300
    assert len(plan.groups) <= 8
    for group in plan.groups:
        assert group.mask.any(-1).all()  # no softmax is empty
        padded = ~group.valid
        assert (group.queries[padded] == 0).all()
        assert (group.query_depth[padded] == 0).all()
        assert group.mask[:, 0][padded].sum(-1).eq(1).all()
        assert group.mask[:, 0][padded][:, 0].all()
        real = group.query_depth[..., None] - group.key_depth[:, None, :]
        assert (real[group.mask[:, 0]] >= 0).all()


def test_groups_can_be_left_out(make_index: Callable[..., Index]) -> None:
    index = make_index(3)
    bin = sequential(index, unit=Unit.SEQUENCE, token_budget=10**6).bins[0]
    plan, ragged = pack(index, bin, "tree").plan, pack(index, bin, "tree", form="ragged").plan
    assert plan is not None
    assert ragged is not None
    assert ragged.groups == ()
    assert torch.equal(plan.kv_index, ragged.kv_index)


def test_equal_prompts_merge_across_items(tmp_path: Path) -> None:
    target = np.array([False, False, True])
    with IndexWriter(tmp_path / "index") as writer:
        for last, first in ((7, 5), (8, 5), (9, 4)):
            one = EncodedSequence(np.array([first, 6, last], np.int32), target)
            writer.add(EncodedSample("", "", [one], np.zeros((0, 2), np.int32), {}, {}))
        index = writer.close()
    bin = sequential(index, unit=Unit.SEQUENCE, token_budget=100).bins[0]
    assert pack(index, bin, "tree").input_ids.shape == (1, 9)
    assert pack(index, bin, "tree", merge_prompts=True).input_ids.tolist() == [[5, 6, 7, 8, 4, 6, 9]]
    assert pack(index, bin, "packed", merge_prompts=True).input_ids.shape == (1, 9)


def test_values_attached_and_given(make_index: Callable[..., Index]) -> None:
    index = make_index(4)
    numbers = np.arange(index.num_sequences) + 1 / 3
    index.attach("attached", numbers)
    bin = sequential(index, unit=Unit.SEQUENCE, token_budget=10**6).bins[0]
    batch = pack(index, bin, "tree", values={"reference": -numbers}, dtype=torch.float64)
    assert batch.sequence_values["attached"].tolist() == numbers.tolist()
    assert batch.sequence_values["reference"].tolist() == (-numbers).tolist()
    assert {value.dtype for value in batch.sequence_values.values()} == {torch.float64}
    assert pack(index, bin, "tree").sequence_values["attached"].dtype == torch.float64  # computed numbers keep it
    filler = pack(index, Bin(bin.items[:1], 0.0), "tree")
    assert filler.weight == 0.0


@pytest.mark.parametrize("layout", ["tree", "packed", "rows"])
def test_mismatched_rows(tmp_path: Path, layout: str) -> None:
    def one(tokens: list[int], prompt: int, end: int) -> EncodedSequence:
        return EncodedSequence(
            np.array(tokens, np.int32), (np.arange(len(tokens)) >= prompt) & (np.arange(len(tokens)) < end)
        )

    with IndexWriter(tmp_path / "index") as writer:
        for sequence in (one([1, 2, 3, 4, 5], 2, 4), one([6, 7, 8], 1, 3)):
            values = {"label": np.ones(1)}
            writer.add(EncodedSample("", "", [sequence], np.zeros((0, 2), np.int32), values, {}))
        index = writer.close()
    index.attach("reference", np.array([-1.0, -2.0]))
    plan = sequential(index, unit=Unit.SEQUENCE, token_budget=100, layout=layout, mismatched=True)
    table = {"reference": {(0, 1): -3.0, (1, 0): -4.0}}
    batch = pack(index, plan.bins[0], layout, select="mismatched", values=table)
    assert plan.mismatched_pairs().tolist() == [[0, 1], [1, 0]]
    tokens = [batch.input_ids.reshape(-1)[path].tolist() for path in paths_of(batch)]
    assert tokens == [[1, 2, 7, 8], [6, 3, 4, 5]]
    assert [batch.depth[batch.seq_of == place].tolist() for place in (0, 1)] == [[2, 3], [1, 2]]
    assert batch.sequence_ids.tolist() == [0, 1]
    assert batch.sequence_values["partner"].tolist() == [1, 0]
    assert batch.sequence_values["reference"].tolist() == [-3, -4]
    assert batch.sequence_values["label"].tolist() == [1, 1]
    assert batch.pairs.shape == (0, 2)
    # Without a table no reference is claimed: the attached one belongs to other tokens.
    assert "reference" not in pack(index, plan.bins[0], layout, select="mismatched").sequence_values
    cut = pack(index, plan.bins[0], layout, select="mismatched", max_length=3)
    assert [cut.input_ids.reshape(-1)[path].tolist() for path in paths_of(cut)] == [[1, 2, 7], [6, 3, 4]]
    with pytest.raises(ValueError, match="mismatched=True"):
        pack(index, Bin((Item(0, (0,), (0,), ()),)), layout, select="mismatched")


@pytest.mark.parametrize("layout", ["tree", "packed", "rows"])
def test_bare_sequences_make_the_same_batch(make_index: Callable[..., Index], layout: str) -> None:
    index = make_index(1, least=3)
    batch = batch_of([index.sequence(number) for number in range(3)], layout)
    same = pack(index, sequential(index, unit=Unit.SEQUENCE).bins[0], layout)
    for name in ("input_ids", "position_ids", "scored", "targets", "target_rows", "seq_idx", "seq_of", "last"):
        assert torch.equal(getattr(batch, name), getattr(same, name)), name


def test_wrong_names_are_refused(make_index: Callable[..., Index]) -> None:
    index = make_index(1)
    bin = sequential(index, unit=Unit.SEQUENCE, token_budget=100).bins[0]
    with pytest.raises(ConfigError, match=r"model\.layout: 'forest'"):
        pack(index, bin, "forest")
    with pytest.raises(ValueError, match="select"):
        pack(index, bin, "tree", select="other")


def test_to_device_moves_every_tensor(make_index: Callable[..., Index]) -> None:
    index = make_index(3)
    batch = pack(index, sequential(index, unit=Unit.SEQUENCE, token_budget=100).bins[0], "tree")
    assert to_device(batch, "cpu") is batch
    moved = to_device(batch, "meta")
    assert moved.plan is not None
    everything = [moved.input_ids, moved.last, *moved.sequence_values.values(), moved.plan.kv_index]
    everything += [tensor for group in moved.plan.groups for tensor in group]
    assert {tensor.device.type for tensor in everything} == {"meta"}
    assert moved.plan.max_q == batch.plan.max_q  # type: ignore[union-attr]


def test_prefetcher_keeps_order_and_looks_ahead() -> None:
    made: list[int] = []
    with Prefetcher(range(10), lambda n: made.append(n) or n * n, ahead=2) as results:
        first = next(iter(results))
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert first == 0
        assert made == [0, 1, 2, 3]  # one taken, two queued, one in hand
        assert list(results) == [n * n for n in range(1, 10)]
    assert not results._thread.is_alive()


def test_prefetcher_raises_where_the_result_would_have_stood() -> None:
    def make(n: int) -> int:
        if n == 2:
            raise ConfigError("no such thing")
        return n

    seen = []

    def consume() -> None:
        with Prefetcher(range(5), make) as results:
            for result in results:
                seen.append(result)

    with pytest.raises(ConfigError, match="no such thing"):
        consume()
    assert seen == [0, 1]


def test_prefetcher_closes_early() -> None:
    before = threading.active_count()
    results = Prefetcher(iter(int, 1), lambda n: n)  # endless
    next(iter(results))
    results.close()
    results.close()
    assert threading.active_count() == before
