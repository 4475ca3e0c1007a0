"""A row for reading: its paths with the supervised parts marked, and its tree."""

from __future__ import annotations

from typing import Any

import numpy as np

from alignlab.data import trie
from alignlab.types import EncodedSample, EncodedSequence

GREEN, RESET = "\033[32m", "\033[0m"


def sample_text(sample: EncodedSample, tokenizer: Any, *, colour: bool = False) -> str:
    """One row for reading: each path's text with the supervised part in green, or between ``[[`` and ``]]``."""
    lines = [f"row {sample.id}   source {sample.source or '-'}"]
    roles: dict[int, str] = {}
    for chosen, rejected in sample.pairs.tolist():
        roles.setdefault(chosen, "chosen")
        roles.setdefault(rejected, "rejected")
    for number, sequence in enumerate(sample.sequences):
        values = {n: float(v[number]) for n, v in sample.sequence_values.items() if n != "weight"}
        notes = [roles.get(number, ""), *(f"{n} {v:g}" for n, v in values.items() if v == v)]
        head = " ".join(note for note in notes if note)
        targets = int(sequence.target.sum())
        lines.append(f"-- path {number} {head}  ({len(sequence.tokens)} tokens, {targets} supervised)")
        lines.append(marked(sequence, tokenizer, colour=colour))
    lines.append(f"-- tree: {tree_text(sample)}")
    return "\n".join(lines)


def marked(sequence: EncodedSequence, tokenizer: Any, *, colour: bool = False) -> str:
    """The decoded path with its supervised stretches marked."""
    begin, end = (GREEN, RESET) if colour else ("[[", "]]")
    out = []
    borders = np.flatnonzero(np.diff(sequence.target)) + 1
    for tokens, target in zip(np.split(sequence.tokens, borders), np.split(sequence.target, borders), strict=True):
        text = tokenizer.decode(tokens.tolist()) if tokenizer is not None else " ".join(map(str, tokens.tolist()))
        out.append(f"{begin}{text}{end}" if target[0] else text)
    return "".join(out)


def tree_text(sample: EncodedSample, mixes_inputs: bool = False) -> str:
    """The nodes of the row's trie: ``0:18 -> 1:7, 2:9`` reads node 0 of 18 tokens with children 1 and 2."""
    built = trie.build(sample.sequences, mixes_inputs)
    children: dict[int, list[int]] = {}
    lengths = np.diff(built.node_ptr)
    for node, parent in enumerate(built.parent.tolist()):
        children.setdefault(parent, []).append(node)
    parts = []
    for node in range(len(lengths)):
        below = ", ".join(f"{child}:{lengths[child]}" for child in children.get(node, []))
        if below:
            parts.append(f"{node}:{lengths[node]} -> {below}")
    return "; ".join(parts) or f"one node of {lengths.sum()} tokens"
