"""``alignlab inspect``: rows as the model sees them: the tree, the rendered template, supervised tokens in colour."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from alignlab.cli import Request, emit
from alignlab.data import trie
from alignlab.job import prepare_data
from alignlab.types import EncodedSample, EncodedSequence

GREEN, RESET = "\033[32m", "\033[0m"
ROWS = 3


def run(request: Request) -> int:
    """Show the first rows of any data configuration, and what became of all of them."""
    data = prepare_data(request.config)
    index, manifest = data.train.index, data.train.manifest
    colour = sys.stdout.isatty()
    shown = []
    for place in range(min(ROWS, len(index))):
        sample = index.sample(place)
        print(sample_text(sample, data.tokenizer, colour=colour))
        print()
        shown.append(_as_json(sample, data.tokenizer, data.objective.mixes_inputs))
    dropped = manifest["read"] - manifest["kept"]
    print(f"rows     {manifest['read']:,} read = {manifest['kept']:,} kept + {dropped:,} dropped {manifest['dropped']}")
    if manifest["parts"]:
        print(f"parts    left out of kept rows: {manifest['parts']}")
    share = 100 * manifest["target_tokens"] / max(1, manifest["tokens"])
    print(f"masks    {share:.1f}% of {manifest['tokens']:,} tokens supervised, terminator in "
          f"{manifest['terminated']:,} of {manifest['turns']:,} turns")  # fmt: skip
    lengths = np.asarray(index.lengths)
    quantiles = np.percentile(lengths, (50, 95, 100)).astype(int).tolist()
    print(f"lengths  median {quantiles[0]}, 95% {quantiles[1]}, longest {quantiles[2]}")
    tree = int(index.tree_tokens(data.objective.mixes_inputs).sum())
    print(f"tree     {tree:,} tokens with shared prefixes once, {int(lengths.sum()):,} without")
    for condition, count in sorted(manifest["conditions"].items()):
        print(f"         {count:>7,} {condition}")
    print(f"template {manifest['template']}")
    emit(request, {"rows": shown, "manifest": manifest, "template": manifest["template"], "tree_tokens": tree})
    return 0


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


def _as_json(sample: EncodedSample, tokenizer: Any, mixes_inputs: bool) -> dict[str, Any]:
    return {
        "id": sample.id,
        "source": sample.source,
        "tree": tree_text(sample, mixes_inputs),
        "pairs": sample.pairs.tolist(),
        "sequences": [
            {
                "input_ids": sequence.tokens.tolist(),
                "target_mask": sequence.target.tolist(),
                "text": marked(sequence, tokenizer),
            }
            for sequence in sample.sequences
        ],
    }
