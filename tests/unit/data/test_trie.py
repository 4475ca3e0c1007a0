"""The trie against its sequences, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.data import trie
from alignlab.types import EncodedSequence


def seq(tokens: list[int], targets: list[int] | None = None) -> EncodedSequence:
    """``targets``: positions; default: the second half."""
    mask = np.zeros(len(tokens), dtype=bool)
    mask[range(max(1, len(tokens) // 2), len(tokens)) if targets is None else targets] = True
    mask[0] = False
    return EncodedSequence(np.array(tokens, dtype=np.int32), mask)


@st.composite
def sequences(draw: st.DrawFn) -> list[EncodedSequence]:
    """Sequences over three tokens, so that prefixes are often shared; some continue, equal or re-flag another."""
    made: list[EncodedSequence] = []
    for _ in range(draw(st.integers(1, 7))):
        start = draw(st.sampled_from(made)).tokens.tolist() if made and draw(st.booleans()) else []
        start = start[: draw(st.integers(0, len(start)))]
        tokens = start + draw(st.lists(st.integers(0, 2), min_size=0 if start else 1, max_size=6))
        flags = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
        made.append(seq(tokens, [i for i, flag in enumerate(flags) if flag]))
    return made


def prefixes(items: list[EncodedSequence], mixes: bool, groups: list[int]) -> set[tuple]:
    """All prefixes of all sequences: the tokens of the tree, told naively."""
    found = set()
    for item, group in zip(items, groups, strict=True):
        keys = list(zip(item.tokens.tolist(), item.target.tolist() if mixes else [0] * len(item.tokens), strict=True))
        found |= {(group, *keys[: end + 1]) for end in range(len(keys))}
    return found


@given(sequences(), st.booleans(), st.data())
def test_tree_holds_every_sequence_once(items: list[EncodedSequence], mixes: bool, data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(items), max_size=len(items)))
    tree = trie.build(items, mixes, groups)
    assert len(tree.tokens) == len(prefixes(items, mixes, groups))
    for number, item in enumerate(items):
        path = tree.path(number)
        np.testing.assert_array_equal(tree.tokens[path], item.tokens)
        np.testing.assert_array_equal(tree.depth[path], np.arange(len(path)))
        np.testing.assert_array_equal(tree.previous[path], [-1, *path[:-1]])
        assert tree.last[number] == path[-1]
        np.testing.assert_array_equal(tree.seq_rows[tree.seq_ptr[number] : tree.seq_ptr[number + 1]], path[item.target])
    np.testing.assert_array_equal(
        np.flatnonzero(tree.target), np.unique(np.concatenate([tree.path(n)[i.target] for n, i in enumerate(items)]))
    )


@given(sequences(), st.booleans())
def test_nodes_are_maximal_runs_in_topological_order(items: list[EncodedSequence], mixes: bool) -> None:
    tree = trie.build(items, mixes)
    children = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree.parent))
    assert not (children == 1).any()  # an only child would belong to its parent's run
    assert (tree.parent < np.arange(len(tree.parent))).all()
    ptr, keys = tree.keys()
    for node in range(len(tree.parent)):
        row, path = int(tree.node_ptr[node + 1]) - 1, []
        while row >= 0:
            path.append(row)
            row = int(tree.previous[row])
        np.testing.assert_array_equal(keys[ptr[node] : ptr[node + 1]], path[::-1])


@given(sequences(), st.booleans())
def test_size_without_building(items: list[EncodedSequence], mixes: bool) -> None:
    assert trie.size(items, mixes) == len(trie.build(items, mixes).tokens)


def test_known_shapes() -> None:
    prompt = [1, 2, 3]
    tree = trie.build([seq([*prompt, 4, 5], [3, 4]), seq([*prompt, 4, 6, 7], [3, 4, 5])], False)
    np.testing.assert_array_equal(tree.tokens, [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(tree.parent, [-1, 0, 0])
    np.testing.assert_array_equal(tree.previous, [-1, 0, 1, 2, 3, 3, 5])  # 6 is read off the shared 4
    np.testing.assert_array_equal(tree.seq_rows, [3, 4, 3, 5, 6])  # the shared first response token stands once

    strict_prefix = trie.build([seq([1, 2]), seq([1, 2, 3, 4]), seq([1])], False)
    np.testing.assert_array_equal(strict_prefix.node_ptr, [0, 4])
    np.testing.assert_array_equal(strict_prefix.last, [1, 3, 0])

    same = trie.build([seq([1, 2, 3]), seq([1, 2, 3])], True)
    assert len(same.tokens) == 3
    assert same.last.tolist() == [2, 2]


def test_flags_are_keys_only_when_inputs_are_mixed() -> None:
    items = [seq([1, 2, 3, 4], [1, 2, 3]), seq([1, 2, 3, 5], [3])]  # 2 and 3: target here, context there
    assert len(trie.build(items, False).tokens) == 5
    assert len(trie.build(items, True).tokens) == 7


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        trie.build([EncodedSequence(np.zeros(0, np.int32), np.zeros(0, bool))], False)


def test_deep_chains_need_no_recursion() -> None:
    items = [seq([0] * n + [1]) for n in range(1, 1020)]
    tree = trie.build(items, False)
    assert len(tree.tokens) == 1019 + 1019
    assert trie.size(items, False) == len(tree.tokens)
