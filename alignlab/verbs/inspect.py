"""``alignlab inspect``: rows as the model sees them: the tree, the rendered template, supervised tokens in colour.

``--lint`` looks for what is wrong with the rows instead; it needs no model and no objective, and says more with them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from alignlab.configuration import schema
from alignlab.data import condition_preview
from alignlab.errors import ConfigError
from alignlab.lint import clean, report
from alignlab.lint.check import LintConfig, lint
from alignlab.request import Request, emit
from alignlab.runs.job import make_encoder, make_objective, needs_of, prepare_data
from alignlab.runs.rowtext import marked, sample_text, tree_text
from alignlab.types import EncodedSample
from alignlab.verbs.options import own_options

ROWS = 3


def run(request: Request) -> int:
    """Show the first rows of any data configuration, and what became of all of them; or look for what is wrong."""
    if request.own:
        return _lint(request)
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
    if manifest["conditions"]:
        print("\n".join(condition_preview.table_text(manifest["conditions"])))
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


def _lint(request: Request) -> int:
    """Exit code 1 where an error was found that no row's leaving mends."""
    config = request.config
    settings, target = _lint_settings(request)
    if target is not None:
        clean.check_target(target, config.data, overwrite=config.overwrite)
    encoder = make_encoder(config.model, config.data)[1] if config.model.name_or_path != schema.REQUIRED else None
    needs = needs_of(make_objective(config)) if config.objective is not None else None
    if needs is None:
        encoder = None  # which answers the template is given is the objective's word
    found = lint(config.data, settings, encoder, needs)
    print("\n".join(report.lines(found)))
    result = report.as_json(found)
    leaving = {}
    if target is not None:
        leaving = found.findings.leaving(settings.keep, settings.drop)
        kept, left_out = clean.write(target, config.data, leaving, found.rows, needs)
        print(f"written  {kept:,} rows to {target}, {left_out:,} left out to {clean.second_file(target)}")
        result["written"] = {"path": target, "kept": kept, "left_out": left_out}
    errors = sum(1 for _ in found.findings.errors(leaving))
    print(f"verdict  {errors:,} errors{' left' if target is not None else ''}")
    emit(request, {**result, "errors": errors})
    return 1 if errors else 0


def _lint_settings(request: Request) -> tuple[LintConfig, Path | None]:
    """(what to look for, where the cleaned rows go)."""
    own = request.own
    if str(own.get("lint", "true")).lower() not in ("true", "false"):
        raise ConfigError(f"lint: {own['lint']} (expected true or false)")
    if str(own.get("lint", "false")).lower() != "true":
        raise ConfigError(f"{next(name for name in own)}: belongs to inspect --lint")
    target = Path(str(own["write"])).expanduser() if own.get("write") else None
    return own_options(request, LintConfig, "lint."), target
