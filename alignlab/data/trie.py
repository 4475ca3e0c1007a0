"""The prompt tree: token sequences merged at their common prefixes.

A node is a maximal run of tokens without a branch; sequences may end anywhere in it.  Every token of the tree has one
predecessor, so one hidden row predicts it, however many sequences it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from alignlab.types import EncodedSequence


@dataclass(frozen=True, slots=True)
class Trie:
    """T tokens on one line, node after node, every node after its parent; K nodes, S sequences, M targets.

    Several trees may stand on one line (``build``'s ``groups``): their roots have parent -1.
    """

    tokens: np.ndarray
    """int32 [T]"""
    depth: np.ndarray
    """int64 [T]: position on the path from the root"""
    previous: np.ndarray
    """int64 [T]: row of the token before it on the path, -1 at a root's first token"""
    target: np.ndarray
    """bool [T]: a target in at least one sequence"""
    node_ptr: np.ndarray
    """int64 [K + 1]: node k is rows ``node_ptr[k]:node_ptr[k + 1]``"""
    parent: np.ndarray
    """int64 [K]: its parent's number, -1 for a root"""
    path_ptr: np.ndarray
    """int64 [S + 1]: the nodes of sequence s, root first, are ``path_nodes[path_ptr[s]:path_ptr[s + 1]]``"""
    path_nodes: np.ndarray
    lengths: np.ndarray
    """int64 [S]: tokens of each sequence; its last node may be longer than what the sequence uses of it"""
    seq_ptr: np.ndarray
    """int64 [S + 1]: the targets of sequence s are ``seq_rows[seq_ptr[s]:seq_ptr[s + 1]]``, in path order"""
    seq_rows: np.ndarray
    """int64 [M]: rows"""
    last: np.ndarray
    """int64 [S]: row of each sequence's last token"""

    def path(self, sequence: int) -> np.ndarray:
        """int64 [lengths[sequence]]: the rows of one sequence, first token first."""
        nodes = self.path_nodes[self.path_ptr[sequence] : self.path_ptr[sequence + 1]]
        return ranges(self.node_ptr[nodes], self.node_ptr[nodes + 1])[: self.lengths[sequence]]

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """(ptr int64 [K + 1], rows int64): what each node's queries may see, its ancestors' rows and then its own."""
        nodes = np.array([node for chain in self.chains() for node in chain], dtype=np.int64)
        counts = self.depth[self.node_ptr[1:] - 1] + 1
        return _pointers(counts), ranges(self.node_ptr[nodes], self.node_ptr[nodes + 1])

    def chains(self) -> list[list[int]]:
        """For each node its ancestors, root first, and itself."""
        chains: list[list[int]] = []
        for node, parent in enumerate(self.parent.tolist()):
            chains.append([node] if parent < 0 else [*chains[parent], node])
        return chains


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """int64: ``arange(start, stop)`` of every pair, one after the other."""
    sizes = stops - starts
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - sizes), sizes)


def _pointers(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)))


def _keys(sequence: EncodedSequence, mixes_inputs: bool) -> np.ndarray:
    """What must be equal for two tokens to be one: the id and, where a target's input is mixed (IFT), the flag."""
    return sequence.tokens.astype(np.int64) * 2 + sequence.target if mixes_inputs else sequence.tokens


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many first entries are equal."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    first = int(different.argmax()) if size else 0
    return first if size and different[first] else size


def size(sequences: Sequence[EncodedSequence], mixes_inputs: bool) -> int:
    """Tokens of the tree of these sequences, without building it.

    In lexicographic order each sequence shares most with its neighbour: the sum of lengths less the common prefixes.
    """
    keys = [_keys(sequence, mixes_inputs) for sequence in sequences]
    if len(keys) > 2:
        keys.sort(key=lambda values: values.astype(">i8").tobytes())
    return sum(map(len, keys)) - sum(common_prefix(a, b) for a, b in pairwise(keys))


def build(sequences: Sequence[EncodedSequence], mixes_inputs: bool, groups: Sequence[int] | None = None) -> Trie:
    """Merge ``sequences`` (each of at least one token) at their common prefixes.

    ``groups``: one number a sequence; only sequences with the same number share (default: all may).  Distinct numbers
    everywhere give the line without sharing.
    """
    nodes = _Nodes([_keys(sequence, mixes_inputs) for sequence in sequences])
    group_of = [0] * len(sequences) if groups is None else [int(group) for group in groups]
    roots: dict[int, dict[int, int]] = {}
    for number, group in enumerate(group_of):
        nodes.insert(number, roots.setdefault(group, {}))

    order = nodes.preorder(roots.values())
    place = {node: k for k, node in enumerate(order)}
    begin = np.array([nodes.begin[node] for node in order], dtype=np.int64)
    end = np.array([nodes.end[node] for node in order], dtype=np.int64)
    node_ptr = _pointers(end - begin)
    parent = np.array([place.get(nodes.parent[node], -1) for node in order], dtype=np.int64)
    pieces = [sequences[nodes.owner[node]].tokens[nodes.begin[node] : nodes.end[node]] for node in order]
    tokens = np.concatenate(pieces).astype(np.int32, copy=False) if pieces else np.zeros(0, np.int32)

    paths = [nodes.path(number, roots[group]) for number, group in enumerate(group_of)]
    path_nodes = np.array([place[node] for path in paths for node in path], dtype=np.int64)
    path_ptr = _pointers(np.array([len(path) for path in paths], dtype=np.int64))
    lengths = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.int64)

    previous = np.arange(len(tokens), dtype=np.int64) - 1
    previous[node_ptr[:-1]] = np.where(parent >= 0, node_ptr[parent + 1] - 1, -1)
    rows, last = [], np.zeros(len(sequences), dtype=np.int64)
    for number, sequence in enumerate(sequences):
        own = path_nodes[path_ptr[number] : path_ptr[number + 1]]
        path = ranges(node_ptr[own], node_ptr[own + 1])[: lengths[number]]
        rows.append(path[sequence.target])
        last[number] = path[-1]
    seq_rows = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    target = np.zeros(len(tokens), dtype=bool)
    target[seq_rows] = True
    return Trie(
        tokens=tokens,
        depth=ranges(begin, end),
        previous=previous,
        target=target,
        node_ptr=node_ptr,
        parent=parent,
        path_ptr=path_ptr,
        path_nodes=path_nodes,
        lengths=lengths,
        seq_ptr=_pointers(np.array([len(part) for part in rows], dtype=np.int64)),
        seq_rows=seq_rows,
        last=last,
    )


class _Nodes:
    """A radix tree: node n holds ``keys[owner[n]][begin[n]:end[n]]``; children by the first key of their run."""

    def __init__(self, keys: list[np.ndarray]) -> None:
        self.keys = keys
        self.owner: list[int] = []
        self.begin: list[int] = []
        self.end: list[int] = []
        self.parent: list[int] = []
        self.children: list[dict[int, int]] = []

    def _add(self, owner: int, begin: int, end: int, parent: int) -> int:
        self.owner.append(owner)
        self.begin.append(begin)
        self.end.append(end)
        self.parent.append(parent)
        self.children.append({})
        return len(self.owner) - 1

    def insert(self, number: int, roots: dict[int, int]) -> None:
        keys = self.keys[number]
        if not len(keys):
            raise ValueError("a sequence without tokens has no place in a tree")
        node, depth, children = -1, 0, roots
        while depth < len(keys):
            child = children.get(int(keys[depth]))
            if child is None:
                if node >= 0 and not children:  # a leaf that this sequence continues: still one run
                    self.owner[node], self.end[node] = number, len(keys)
                else:
                    children[int(keys[depth])] = self._add(number, depth, len(keys), node)
                return
            depth += common_prefix(keys[depth:], self.keys[self.owner[child]][depth : self.end[child]])
            if depth < self.end[child] and depth < len(keys):
                self._split(child, depth)
            node, children = child, self.children[child]

    def _split(self, node: int, depth: int) -> None:
        """Cut ``node`` before ``depth``; the lower part becomes its only child."""
        lower = self._add(self.owner[node], depth, self.end[node], node)
        self.children[lower] = self.children[node]
        for child in self.children[lower].values():
            self.parent[child] = lower
        self.end[node] = depth
        self.children[node] = {int(self.keys[self.owner[node]][depth]): lower}

    def preorder(self, roots: Iterable[dict[int, int]]) -> list[int]:
        """Every node after its parent and before its younger siblings, in the order of insertion."""
        stack = [node for children in roots for node in children.values()][::-1]
        order = []
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(reversed(self.children[node].values()))
        return order

    def path(self, number: int, roots: dict[int, int]) -> list[int]:
        keys, depth, children = self.keys[number], 0, roots
        path = []
        while depth < len(keys):
            node = children[int(keys[depth])]
            path.append(node)
            depth, children = self.end[node], self.children[node]
        return path
