"""``alignlab inspect``: rows as the model sees them: the tree, the rendered template, supervised tokens in colour."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from alignlab.cli import Request, emit
from alignlab.job import prepare_data
from alignlab.rowtext import marked, sample_text, tree_text
from alignlab.types import EncodedSample

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
