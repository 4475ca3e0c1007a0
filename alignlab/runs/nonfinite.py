"""What is kept of numbers that are not finite: the rows, by name and place, and the micro-batches themselves.

``nonfinite.json`` tells of the last such step; ``nonfinite/`` has the same for each of them (``step-3.json``) and the
tensors of the micro-batches that went wrong (``step-3-rank-1-batch-0.safetensors``), written by the ranks they were on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from alignlab import dist
from alignlab.data.ledger import SAMPLES_FILE
from alignlab.data.loader import Loader
from alignlab.data.prepare import Prepared
from alignlab.durable import write_atomic
from alignlab.errors import NumericsError
from alignlab.runfolder import RunFolder
from alignlab.runs.job import Job
from alignlab.train.evaluation import bad_batches
from alignlab.train.locate import BadBatch
from alignlab.train.logging import json_number
from alignlab.train.loop import BadStep
from alignlab.types import PackedBatch, StepContext

SHOWN = 4
"""Rows that a message names; the file has all."""


def of_step(job: Job, folder: RunFolder, bad: BadStep) -> str:
    """Keep what a training step that is not finite is made of; where it happened, in words.  Collective."""
    step = bad.plan.step + 1
    facts = {"step": step, **{name: json_number(value) for name, value in bad.metrics.items()}}
    everyone = sorted({item.sample for one in bad.plan.bins for item in one.items if one.weight})
    return _kept(folder, f"step-{step}", facts, job.loader, job.data.train, bad.located, everyone)


def of_evaluation(job: Job, folder: RunFolder, step: int, found: Mapping[str, float], context: StepContext) -> str:
    """Which held-out rows gave a figure that is not finite; empty where all are.  Collective.

    ``train.nonfinite=stop`` raises :class:`NumericsError`; with ``skip`` the answer is for the user to read.
    """
    wrong = sorted(name for name, value in found.items() if not math.isfinite(value))
    if not wrong:
        return ""
    assert job.held_loader is not None
    assert job.held_plans is not None
    assert job.data.held_out is not None
    located = bad_batches(job.engine, job.data.objective, job.held_plans, job.held_loader, context)
    facts = {"step": step, **{name: json_number(value) for name, value in found.items()}}
    everyone = job.held_loader.index.rows.tolist()
    where = _kept(folder, f"evaluation-{step}", facts, job.held_loader, job.data.held_out, located, everyone)
    text = f"{wrong[0]} {found[wrong[0]]} after step {step} is not finite. {where}"
    if job.config.train.nonfinite == "stop":
        raise NumericsError(f"{text} Look at nonfinite.json, or set train.nonfinite=skip to go on all the same")
    return text


def _kept(
    folder: RunFolder, name: str, facts: dict[str, Any], loader: Loader, rows: Prepared, located: list[BadBatch],
    everyone: list[int],
) -> str:  # fmt: skip
    """Write the account and the tensors; the rows in words.  ``everyone``: the rows to name where none stands out."""
    mine = [_described(folder, name, loader, one) for one in located]
    batches = [one for of_rank in dist.all_gather_object(mine) for one in of_rank]
    named = {sample["number"]: sample for one in batches for sample in one["samples"]}
    samples = [named[number] for number in sorted(named)] or [_named(loader, number) for number in everyone]
    if dist.is_main():
        places = _places(rows.folder / SAMPLES_FILE, [sample["number"] for sample in samples])
        listed = [{**sample, **places.get(sample["number"], {})} for sample in samples]
        report = {**facts, "seen_again": bool(batches), "samples": listed, "batches": batches}
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        folder.nonfinite.mkdir(exist_ok=True)
        write_atomic(folder.nonfinite / f"{name}.json", text)
        write_atomic(folder.path / "nonfinite.json", text)
    shown = ", ".join(sample["id"] for sample in samples[:SHOWN])
    shown += f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    if not batches:
        return f"A second pass over its rows ({shown}) was finite."
    ranks = ", ".join(str(rank) for rank in sorted({one["rank"] for one in batches}))
    return f"At rows {shown} (rank {ranks})."


def _places(account: Path, numbers: list[int]) -> dict[int, dict[str, Any]]:
    """File and line of samples, from the index's account; empty where it cannot be read."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(account, columns=["number", "file", "line"], filters=[("number", "in", numbers)])
    except (ArrowException, OSError):
        return {}
    return {row.pop("number"): row for row in table.to_pylist()}


def _described(folder: RunFolder, name: str, loader: Loader, bad: BadBatch) -> dict[str, Any]:
    """One bad micro-batch as plain JSON, its tensors written; the rows with a bad value, or all where none has one."""
    numbers = loader.samples_of(bad.batch)
    values: list[float | None] = [None] * len(numbers) if bad.values is None else bad.values.double().tolist()
    wrong = {number for number, value in zip(numbers, values, strict=True) if value is None or not math.isfinite(value)}
    rows = []
    for number in sorted(wrong or set(numbers)):
        own = [i for i, other in enumerate(numbers) if other == number]
        lengths = loader.index.lengths[bad.batch.sequence_ids.cpu().numpy()[own]].tolist()
        parts = [
            {"tokens": tokens} | ({} if (value := values[i]) is None else {bad.kind: json_number(value)})
            for i, tokens in zip(own, lengths, strict=True)
        ]
        rows.append({**_named(loader, number), "sequences": parts})
    path = folder.nonfinite / f"{name}-rank-{dist.rank()}-batch-{bad.number}.safetensors"
    return {
        "rank": dist.rank(), "micro_batch": bad.number, "loss": json_number(bad.loss),
        "gradients": list(bad.parameters), "samples": rows, "file": _written(path, folder, bad),
    }  # fmt: skip


def _named(loader: Loader, number: int) -> dict[str, Any]:
    return {"number": number, "id": loader.index.sample_id(number), "source": loader.index.source(number)}


def _written(path: Path, folder: RunFolder, bad: BadBatch) -> str:
    """The file's path in the run folder, or why there is none: a full disk must not hide what is being reported."""
    from safetensors.torch import save_file

    values = {} if bad.values is None else {f"sequence_{bad.kind}": bad.values}
    # Copies, since safetensors refuses tensors that share memory.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in (_plain(bad.batch) | values).items()}
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata={"loss": str(bad.loss), "rank": str(dist.rank())})
    except Exception as error:  # safetensors has errors of its own for a disk that is full
        return f"not written: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return str(path.relative_to(folder.path))


def _plain(batch: PackedBatch) -> dict[str, Tensor]:
    """The tensors of a micro-batch, but for its attention plan, which follows from them."""
    own = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    for name in ("sequence_values", "pair_values"):
        own |= {f"{name}.{key}": value for key, value in getattr(batch, name).items()}
    return own
