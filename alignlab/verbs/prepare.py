"""``alignlab prepare``: everything that ``train`` would fetch or build, done beforehand and without a GPU."""

from __future__ import annotations

from alignlab.cli import Request, emit
from alignlab.data import cache
from alignlab.job import prepare_data


def run(request: Request) -> int:
    """Download or convert the model, build DeepSpeed's CPU op where the engine needs it, index the rows."""
    config = request.config
    if config.engine.name.startswith("zero"):
        from alignlab.engine import deepspeed

        deepspeed.prebuild(lambda line: print(f"op       {line}"))
    data = prepare_data(config)
    accounts = {"train": data.train.manifest}
    if data.held_out is not None:
        accounts["held_out"] = data.held_out.manifest
    for name, manifest in accounts.items():
        dropped = ", ".join(f"{reason} {n}" for reason, n in sorted(manifest["dropped"].items())) or "none"
        print(
            f"{name:<8} {manifest['read']:,} read = {manifest['kept']:,} kept + "
            f"{manifest['read'] - manifest['kept']:,} dropped ({dropped}); {manifest['sequences']:,} sequences, "
            f"{manifest['pairs']:,} pairs, {manifest['tokens']:,} tokens"
        )
    print(f"index    {data.train.folder}   ({'made' if data.train.fresh else 'cached'})")
    print(f"cache    {cache.root()}")
    emit(request, {"data": accounts, "index": str(data.train.folder), "fresh": data.train.fresh})
    return 0
