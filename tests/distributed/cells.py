"""What each rank of one launch does; called through ``spawn``.  Returns plain numbers, the tests judge them."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from toy import Toy, make, state_bits, train_step

from alignlab import dist
from alignlab.engine import checkpoint
from alignlab.errors import AlignlabError, ConfigError, StorageError
from alignlab.types import Ask

CELLS: dict[str, dict[str, Any]] = {
    **{f"{name}-fp32": {"name": name} for name in ("zero0", "zero1", "zero2", "zero3")},
    **{f"{name}-bf16": {"name": name, "dtype": "bf16"} for name in ("zero1", "zero2", "zero3")},
    **{f"{name}-lora": {"name": name, "adapter": True} for name in ("zero0", "zero1", "zero2", "zero3")},
    **{f"{name}-rmsprop": {"name": name, "optim": "rmsprop"} for name in ("zero0", "zero3")},
    **{f"{name}-offload": {"name": name, "offload_optimizer": True} for name in ("zero1", "zero2", "zero3")},
}
LOCAL: dict[str, dict[str, Any]] = {
    "local-fp32": {"name": "local"},
    "local-bf16": {"name": "local", "dtype": "bf16"},
    "local-lora": {"name": "local", "adapter": True},
    "local-rmsprop": {"name": "local", "optim": "rmsprop"},
}
BEFORE, AFTER = 20, 4


def cells_of(ranks: int) -> dict[str, dict[str, Any]]:
    """One rank adds the plain engine, and leaves out what differs from two ranks in nothing but time."""
    if ranks > 1:
        return CELLS
    return LOCAL | {key: cell for key, cell in CELLS.items() if key.endswith(("fp32", "bf16"))}


def build(cell: dict[str, Any], seed: int = 0) -> Any:
    options = dict(cell)
    name = options.pop("name")
    optim = {"name": options.pop("optim")} if "optim" in options else {}
    dtype = options.pop("dtype", "fp32")
    adapter = options.pop("adapter", False)
    return make(name, dtype, seed=0 if adapter else seed, adapter=adapter, **optim, **options)


def resumed(cell: dict[str, Any], folder: Path, seed: int = 1) -> dict[str, Any]:
    """Go on from ``folder`` in an engine of other initial values."""
    engine = build(cell, seed)
    engine.load(folder)
    out = {"updates": engine.updates, "curve": [train_step(engine, s) for s in range(BEFORE, BEFORE + AFTER)]}
    engine.close()
    return out


def curve_and_resume(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Twenty steps, a checkpoint, four more; and the four again from the checkpoint, in a fresh engine."""
    engine = build(cell)
    counters = [update_counters(engine)]
    curve = [train_step(engine, s) for s in range(BEFORE)]
    counters.append(update_counters(engine))
    saved = state_bits(engine, folder)
    after = [train_step(engine, s) for s in range(BEFORE, BEFORE + AFTER)]
    end = state_bits(engine, folder.with_name(folder.name + "-end"))
    engine.close()
    engine = build(cell, seed=1)
    engine.load(folder)
    counters.append(update_counters(engine))
    loaded = state_bits(engine, folder.with_name(folder.name + "-loaded"))
    again = [train_step(engine, s) for s in range(BEFORE, BEFORE + AFTER)]
    end_again = state_bits(engine, folder.with_name(folder.name + "-end-again"))
    updates = engine.updates
    engine.close()
    keys = ("curve", "after", "again", "saved", "loaded", "end", "end_again", "updates", "counters")
    return dict(zip(keys, (curve, after, again, saved, loaded, end, end_again, updates, counters), strict=True))


def update_counters(engine: Any) -> list[float]:
    """What the optimizer itself has counted, for each of its tensors."""
    state = engine._optimizer.state if engine.name == "local" else engine._state()
    return sorted({float(entry["step"]) for entry in state.values() if "step" in entry})


def everything(folder: str, sources: dict[str, str]) -> dict[str, Any]:
    """All cells of this world size.  ``sources``: checkpoints of other settings, by cell suffix."""
    root = Path(folder)
    dist.init(timeout=60)
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger().addHandler(handler)
    out: dict[str, Any] = {"curves": {}, "crossed": {}}
    with redirect_stdout(printed):
        cells = cells_of(dist.world_size())
        for key, cell in cells.items():
            out["curves"][key] = curve_and_resume(cell, root / key)
        for key, cell in cells.items():
            source = sources.get(key.split("-")[1])
            if source:
                out["crossed"][key] = resumed(cell, Path(source))
    out["details"] = {name: details(name) for name in ("zero0", "zero1", "zero2", "zero3")}
    if dist.world_size() == 1:
        out["details"]["local"] = details("local")
    out["publish"] = publishing(root / "published")
    out["collectives"] = collectives()
    out["printed"] = printed.getvalue()
    return out


def details(name: str) -> dict[str, Any]:
    """Export, scoring in eval mode, and a gradient that is not finite."""
    engine = make(name)
    train_step(engine, 0)
    engine.train(False)
    from toy import micro_batch

    with torch.no_grad():
        scores = engine.score(micro_batch(5, 0), Ask()).logps
    engine.train(True)
    state = engine.full_state_dict()
    twin = Toy(seed=3)
    same, names = None, sorted(state)
    if engine.rank == 0:
        twin.load_state_dict(state)
        with torch.no_grad():
            same = bool(torch.equal(twin.eval()(micro_batch(5, 0), Ask()).logps, scores))
    before = engine.updates
    from toy import accumulate

    accumulate(engine, 1)
    norms = engine.gradient_norms()
    accumulate(engine, 3)
    engine.zero()
    engine.zero()
    _, norm = train_step(engine, 1, poison=True)
    kept = engine.full_state_dict()
    unchanged = all(torch.equal(kept[k], state[k]) for k in state)
    loss, true_norm = train_step(engine, 1)
    out = {"same_scores": same, "names": names, "poisoned_norm": str(norm), "unchanged": unchanged}
    out |= {"skipped": engine.updates - before, "loss_after": loss}
    out |= {"norms": norms, "norm": true_norm}
    engine.close()
    return out


def publishing(root: Path) -> dict[str, Any]:
    """The publish protocol with engine state; then a rank that fails, at three places."""
    engine = make("zero2")
    train_step(engine, 0)
    done = checkpoint.publish(root, 1, engine.save, {"seed": 0})
    last = dist.world_size() - 1
    errors = {}

    def no_space(path: Path) -> None:
        engine.save(path)
        if engine.rank == last:
            raise OSError(28, "No space left on device")

    def our_bug(path: Path) -> None:
        if engine.rank == last:
            raise ValueError("a bug\nwith two lines")
        engine.save(path)

    for place, write in {"after": no_space, "before": our_bug}.items():
        try:
            checkpoint.publish(root, 2, write)
        except StorageError as error:
            errors[place] = str(error)
    found = checkpoint.choose(root)
    assert found.checkpoint is not None
    checkpoint.verify(found.checkpoint.path)
    left = sorted(p.name for p in root.iterdir())
    dist.barrier()
    if dist.is_main():
        (root / "checkpoint-1/engine.json").unlink()
    dist.barrier()
    try:
        checkpoint.choose(root)
    except StorageError as error:
        errors["damaged"] = str(error)
    engine.close()
    return {"step": found.checkpoint.step, "files": sorted(done.files), "errors": errors, "left": left}


def collectives() -> dict[str, Any]:
    engine = make("zero1")
    rank = dist.rank()
    out: dict[str, Any] = {
        "reduce": engine.reduce(torch.tensor([rank + 1.0, 0.1], dtype=torch.float64)).tolist(),
        "gather": engine.gather(torch.arange(rank * 10, rank * 10 + rank + 1)).tolist(),
        "empty": engine.gather(torch.zeros(0)).tolist(),
        "objects": dist.all_gather_object({"rank": rank, "text": "é" * rank}),
        "broadcast": dist.broadcast_object([1, {"a": None}] if rank == 0 else "not this"),
    }
    dist.barrier(5)
    dist.agree("the index", "same")
    if dist.world_size() > 1:
        try:
            dist.agree("the index", rank)
        except ConfigError as error:
            out["agree"] = str(error)
        try:
            dist.raise_together(ConfigError("bad key\nmore") if rank == 1 else None)
        except AlignlabError as error:
            out["together"] = [type(error).__name__, str(error)]
    engine.close()
    return out


def pass_on(source: str, folder: str) -> dict[str, Any]:
    """Load ``source`` in every engine, write it again as this world size holds it, and go on."""
    dist.init(timeout=60)
    curves = {}
    for name in ("zero0", "zero1", "zero2", "zero3"):
        engine = make(name, seed=1)
        engine.load(Path(source))
        state_bits(engine, Path(folder) / name)
        engine.close()
        curves[name] = resumed({"name": name}, Path(folder) / name)["curve"]
    return curves


def missing_rank() -> str:
    """Rank 1 does not come to the barrier; the others are told so."""
    import time

    from alignlab.errors import HangError

    dist.init(timeout=30)
    dist.barrier(10)
    if dist.rank() == 1:
        time.sleep(4)
        return ""
    try:
        dist.barrier(1.5)
    except HangError as error:
        return str(error)
    return "no error"
