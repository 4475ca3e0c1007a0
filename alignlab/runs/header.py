"""What a training run says of itself: the lines before the first step, the last line, the account of its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alignlab.config import RootConfig
from alignlab.configuration.shadows import Probe
from alignlab.durable import write_atomic
from alignlab.models.fourbit import weights_in
from alignlab.runfolder import RunFolder
from alignlab.runs.job import Job
from alignlab.runs.rowtext import sample_text
from alignlab.train.loop import Progress
from alignlab.types import Unit


def write_data_account(folder: RunFolder, job: Job) -> None:
    """``data/``: the account of both sides, the rows left out, the first three rows as the model sees them."""
    folder.data.mkdir(exist_ok=True)
    prepared = job.data.train
    accounts = job.data.accounts()
    for side, rows in (("train", prepared), ("held_out", job.data.held_out)):
        if rows is not None:  # "index": what the rows are as tokens
            accounts[side] = {**accounts[side], "index": rows.index.hash}
    write_atomic(folder.data / "manifest.json", json.dumps(accounts, indent=1, ensure_ascii=False) + "\n")
    write_atomic(folder.data / "rejected.jsonl", (prepared.folder / "rejected.jsonl").read_text(encoding="utf-8"))
    found = "".join(json.dumps(entry) + "\n" for entry in job.data.findings())
    write_atomic(folder.data / "findings.jsonl", found)
    first = [sample_text(prepared.index.sample(i), job.data.tokenizer) for i in range(min(3, len(prepared.index)))]
    write_atomic(folder.data / "samples.txt", "\n\n".join(first) + "\n")


def header(job: Job, folder: RunFolder, progress: Progress, seconds: float) -> list[tuple[str, str]]:
    """The lines before the first step (interface: about ten lines)."""
    config, objective, manifest = job.config, job.data.objective, job.data.train.manifest
    total = job.plans.total_steps
    if progress.step >= total:
        state = "finished"
    else:
        state = f"resumed at {progress.step}" if progress.step else "new"
    dropped = manifest["read"] - manifest["kept"]
    reasons = ", ".join(f"{name} {n}" for name, n in sorted(manifest["dropped"].items()))
    share = 100 * manifest["target_tokens"] / max(1, manifest["tokens"])
    units = "pairs" if objective.example is Unit.PAIR else "sequences"
    lines = [
        ("run", f"{folder.name} -> {folder.path}   ({state})"),
        ("object", _object_text(config, objective, seconds)),
        (
            "data",
            f"{manifest['read']:,} read = {manifest['kept']:,} kept + {dropped:,} dropped"
            + (f" ({reasons}: data/rejected.jsonl)" if dropped else ""),
        ),
        *(("warning", f"{text}: data/findings.jsonl") for text in [findings_text(job.data.accounts())] if text),
        *(("shadow", _shadow_text(probe)) for probe in job.data.probes),
        (
            "masks",
            f"{share:.0f}% of tokens supervised, terminator in {manifest['terminated']:,} of "
            f"{manifest['turns']:,} turns   template {manifest['template']}",
        ),
        ("model", f"{_parameters(job)}   {str(job.loaded.dtype).removeprefix('torch.')}   {job.layout_line}"),
        (
            "batch",
            f"{config.train.global_batch_size} {units} = {job.engine.dp} rank{'s' * (job.engine.dp > 1)}, "
            f"up to {job.plans.limits.token_budget:,} tokens a micro-batch; layout {job.scorer.layout}{_saved(job)}   "
            f"{total} steps   engine {job.engine.name}{_uneven(job)}",
        ),
    ]
    return lines


def _shadow_text(probe: Probe) -> str:
    manifest = probe.rows.manifest
    units = "pairs" if probe.objective.example is Unit.PAIR else "sequences"
    return (
        f"{', '.join(probe.objectives)} on {probe.rows.index.example_count(probe.objective.example):,} {units}"
        f"   ({manifest['read']:,} read = {manifest['kept']:,} kept + {manifest['read'] - manifest['kept']:,} dropped)"
    )


def _saved(job: Job) -> str:
    """How much less the tree computes than sequences apart: in all rows; where rows are merged, in the first step."""
    if job.scorer.layout != "tree":
        return ""
    if job.plans.limits.merge_prompts:
        first = job.plans.at(0)
        plain, tree = first.num_tokens, sum(one.tokens for one in first.bins if one.weight)
    else:
        index = job.data.train.index
        plain, tree = int(index.lengths.sum()), int(index.tree_tokens(job.data.objective.mixes_inputs).sum())
    return f" ({plain / tree:.2g}x fewer tokens)" if tree < plain else ""


def _uneven(job: Job) -> str:
    """How evenly the ranks are loaded in the first step."""
    if job.engine.dp == 1:
        return ""
    first = job.plans.at(0)
    return f"   slowest rank +{first.imbalance:.1%}, fillers {first.filler_share:.1%} of tokens (step 1)"


def findings_text(accounts: Mapping[str, Any]) -> str:
    """What was kept and is suspect, in one line; empty where nothing is."""
    said = []
    for side, name in (("train", "training rows"), ("held_out", "held-out rows")):
        counts = accounts.get(side, {}).get("findings", {})
        if counts:
            said.append(f"{', '.join(f'{kind} {n:,}' for kind, n in sorted(counts.items()))} in the {name}")
    both = accounts.get("overlap", {})
    if both.get("leak"):
        said.append(f"{both['leak']:,} training examples are held out too")
    if both.get("shared_prompt"):
        said.append(f"{both['shared_prompt']:,} prompts are held out too, with other answers")
    return "; ".join(said)


def _parameters(job: Job) -> str:
    parameters = list(job.loaded.model.parameters())
    count = [getattr(p, "ds_numel", weights_in(p)) for p in parameters]
    trained = sum(n for n, p in zip(count, parameters, strict=True) if p.requires_grad)
    total = sum(count)
    return f"{total / 1e6:,.1f}M parameters" + (f", {trained / 1e6:,.2f}M trained" if trained < total else "")


def _object_text(config: RootConfig, objective: Any, seconds: float) -> str:
    names = {"cpo": "Controllable Preference Optimization (2402.19085), not contrastive CPO"}
    text = names.get(objective.name, objective.name)
    loss_type = getattr(config.objective, "loss_type", None)
    if loss_type:
        text += f" {loss_type if isinstance(loss_type, str) else '+'.join(loss_type)}"
    if hasattr(config.objective, "beta") and objective.needs_reference:
        text += f", beta {config.objective.beta:g}"
    text += ", unit " + "+".join(unit.value for unit in objective.units)
    if objective.needs_reference:
        which = config.reference.name_or_path or "initial policy"
        text += f"   reference: {which}, " + (f"computed ({seconds:.0f} s)" if seconds else "cached (0 s)")
    return text


def done_text(before: Mapping[str, float], after: Mapping[str, float], folder: RunFolder, seconds: float) -> str:
    """The last line: the figures that matter before and after, and what to type next."""
    shown = []
    for name in ("eval_correct", "eval_accuracy", "eval_rewards/accuracies", "eval_control/match", "eval_loss"):
        if name in after:
            start = f"{before[name]:.3g} -> " if name in before else ""
            shown.append(f"{name.replace('_', ' ', 1)} {start}{after[name]:.3g}")
    text = ", ".join(shown[:2])
    return f"{text + '   ' if text else ''}{folder.model}   {seconds:.0f} s   next: alignlab evaluate {folder.path}"
