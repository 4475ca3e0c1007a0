"""``alignlab export RUN``: a run's newest checkpoint (or its final model) as a plain Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from alignlab import dist
from alignlab.engine import checkpoint
from alignlab.errors import CheckFailed, ConfigError
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder
from alignlab.runs.export import export_model
from alignlab.runs.job import assemble, prepare_data


def run(request: Request) -> int:
    """Write ``<run>/exports/step-N`` (or copy the finished ``model/`` to ``output_dir`` when one is named).

    The training state is read back into the run's own engine kind in this one process, so a ZeRO checkpoint that
    cannot be read at this world size says so.
    """
    if request.target is None or request.file is None:
        raise ConfigError("export takes a run folder as its first argument: alignlab export runs/x")
    config, folder = request.config, RunFolder(request.file.parent)
    folder.refuse_links()
    found = checkpoint.newest_valid(folder.checkpoints)
    for line in found.damaged:
        print(f"warning  passed over a damaged checkpoint: {line}")
    if found.checkpoint is None:
        if not folder.model.is_dir():
            raise CheckFailed(f"export: {folder} holds no whole checkpoint and no model")
        target = folder.model
    elif folder.finished and folder.model.is_dir():
        target = folder.model
    else:
        target = folder.exports / f"step-{found.checkpoint.step}"
        data = prepare_data(config)
        dist.init(timeout=config.engine.timeout, group=config.engine.name.startswith("zero"))
        try:
            job = assemble(config, data)
            job.engine.load(found.checkpoint.path)
            export_model(job, target)
        finally:
            dist.shutdown()
    if any(word.startswith("output_dir=") for word in request.overrides):
        wanted = Path(os.path.expanduser(config.output_dir))
        if wanted.exists():
            raise ConfigError(f"export: {wanted} exists already; name a new folder")
        shutil.copytree(target, wanted)
        target = wanted
    print(f"model    {target}")
    emit(request, {"model": str(target)})
    return 0
