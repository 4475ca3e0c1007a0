"""What a checkpoint says of its run, and how a run goes on from one.

A checkpoint carries every key that can change a number, with local files as hashes of their contents.  A foreign or
copied one is refused, and what differs is named; ``resume_allow`` names what may.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.configuration import names
from alignlab.configuration.schema import flatten
from alignlab.configuration.watch import plain
from alignlab.configuration.yamlio import brief
from alignlab.engine import checkpoint
from alignlab.errors import ConfigError, StorageError
from alignlab.runfolder import RunFolder
from alignlab.runs.job import Job
from alignlab.train.loop import Progress

SHOWN = 8
"""So many differing fields are named in full; the rest are counted."""


def describe(job: Job, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """What a checkpoint's manifest holds besides its files: the progress, and the fields that a resumed run must share.

    Rank 0's counts; other ranks get the same but for what they would have to read again.
    """
    fields = fields_of(job, folder) if dist.is_main() else {}
    return {"progress": asdict(progress), "engine": job.engine.name, "fields": fields}


def fields_of(job: Job, folder: RunFolder) -> dict[str, Any]:
    """Every number key, ``index`` (the rows as tokens) and ``base`` (the weights that the reference is made of)."""
    config = plain(job.config)
    # The launcher has read the files already; a worker started by hand has to.
    contents = folder.status().get("contents")
    numbers = names.number_keys(config) if contents is None else {**names.stated_keys(config), **contents}
    base = job.loaded.fingerprint if job.data.objective.needs_reference else None
    return {**json.loads(json.dumps(numbers)), "index": job.data.train.index.hash, "base": base}


def resume(job: Job, folder: RunFolder) -> tuple[Progress, list[str]]:
    """Load the checkpoint to go on from; its progress, and a line for each damaged one that was passed over.

    ``resume=auto`` takes the newest valid one of the run's own folder.  So does ``resume=PATH`` once the run has one:
    PATH is where another run's state is taken from, and a restart must not fall back to it.  A PATH inside the run's
    own folder is a deliberate step back, and is taken.  Collective; every rank raises the same error.
    """
    wanted = job.config.resume
    if wanted == "never":
        return Progress(), []
    own = wanted == "auto" or dist.broadcast_object(
        not Path(wanted).resolve().is_relative_to(folder.checkpoints.resolve())
        and bool(checkpoint.paths(folder.checkpoints))
    )
    found = checkpoint.choose(folder.checkpoints) if own else checkpoint.choose_path(Path(wanted))
    chosen = found.checkpoint
    if chosen is None:
        return Progress(), found.damaged
    error: ConfigError | None = None
    if dist.is_main() and (problem := refusal(chosen, fields_of(job, folder), job.config)):
        error = ConfigError(problem)
    dist.raise_together(error)
    progress = Progress(**chosen.meta["progress"])
    job.engine.load(chosen.path)
    if job.engine.updates != progress.step - progress.skipped:
        raise StorageError(
            f"{chosen.path}: its optimizer has done {job.engine.updates} updates, its manifest says "
            f"{progress.step} steps, {progress.skipped} of them skipped"
        )
    return progress, found.damaged


def refusal(chosen: checkpoint.Checkpoint, mine: Mapping[str, Any], config: RootConfig) -> str | None:
    """Why a run with the fields ``mine`` cannot go on from ``chosen``, or None."""
    theirs = chosen.meta.get("fields")
    if not isinstance(theirs, dict) or "progress" not in chosen.meta:
        return f"{chosen.path}: was not written by a training run"
    defaults = flatten(RootConfig(objective=type(config.objective)()))
    differing, known = {}, sorted({*theirs, *mine, *defaults})
    if unknown := [name for name in config.resume_allow if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        return f"resume_allow: no run has '{unknown[0]}'{f'; did you mean {near[0]}?' if near else ''}"
    for key in sorted({*theirs, *mine}):
        # A key that one of the two versions did not have yet was at its default there.
        pair = theirs.get(key, defaults.get(key)), mine.get(key, defaults.get(key))
        if pair[0] != pair[1] and key not in config.resume_allow:
            differing[key] = pair
    if not differing:
        return None
    shown = [f"{key} {brief(old)}, here {brief(new)}" for key, (old, new) in list(differing.items())[:SHOWN]]
    more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return (
        f"{chosen.path}: of another run: {'; '.join(shown)}{more}. "
        f"resume_allow=[{','.join(differing)}] goes on all the same; resume=never starts anew"
    )
