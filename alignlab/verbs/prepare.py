"""``alignlab prepare``: everything that ``train`` would fetch or build, done beforehand and without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from alignlab import liveness
from alignlab.config import RootConfig
from alignlab.data import cache, condition_preview
from alignlab.models.source import fetch
from alignlab.request import Request, emit
from alignlab.runs.header import findings_text
from alignlab.runs.job import JobData, assemble, attach_reference, check_flags, prepare_data


def run(request: Request) -> int:
    """Download or convert the model, build DeepSpeed's CPU op where the engine needs it, index the rows.

    With ``reference=true`` also the reference numbers: in this one process, for any number of ranks to read.
    """
    liveness.gate(request)
    config = request.config
    if config.engine.name.startswith("zero"):
        from alignlab.engine import deepspeed

        deepspeed.prebuild(lambda line: print(f"op       {line}"))
    fetch(config.model)
    if config.reference.name_or_path is not None and config.reference.name_or_path != config.model.name_or_path:
        fetch(replace(config.model, name_or_path=config.reference.name_or_path, revision=None))
    data = prepare_data(config)
    check_flags(data)
    accounts = data.accounts()
    for name in [side for side in ("train", "held_out") if side in accounts]:
        manifest = accounts[name]
        dropped = ", ".join(f"{reason} {n}" for reason, n in sorted(manifest["dropped"].items())) or "none"
        print(
            f"{name:<8} {manifest['read']:,} read = {manifest['kept']:,} kept + "
            f"{manifest['read'] - manifest['kept']:,} dropped ({dropped}); {manifest['sequences']:,} sequences, "
            f"{manifest['pairs']:,} pairs, {manifest['tokens']:,} tokens"
        )
    if conditions := accounts["train"]["conditions"]:
        print("\n".join(condition_preview.table_text(conditions)))
    if text := findings_text(accounts):
        print(f"warning  {text}; listed in findings.jsonl of the index and of a run's data/")
    print(f"index    {data.train.folder}   ({'made' if data.train.fresh else 'cached'})")
    result: dict[str, Any] = {"data": accounts, "index": str(data.train.folder), "fresh": data.train.fresh}
    if config.reference.compute:
        result["reference"] = _reference(config, data)
    print(f"cache    {cache.root()}")
    emit(request, {**result, "cache": str(cache.root())})
    return 0


def _reference(config: RootConfig, data: JobData) -> dict[str, Any] | None:
    """Compute the reference numbers of both sets of rows, unless they are there; None where the loss has none."""
    if not data.objective.needs_reference and not any(probe.needs_reference for probe in data.probes):
        print(f"ref      {data.objective.name} needs no reference")
        return None
    job = assemble(replace(config, engine=replace(config.engine, name="local", offload_optimizer=False)), data)
    try:
        seconds = attach_reference(job)
    finally:
        job.engine.close()
    name = config.reference.name_or_path or "initial policy"
    print(f"ref      {name}: {f'computed ({seconds:.0f} s)' if seconds else 'cached (0 s)'}")
    return {"name": name, "dtype": str(job.loaded.dtype).removeprefix("torch."), "seconds": seconds}
