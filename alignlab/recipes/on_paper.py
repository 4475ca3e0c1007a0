"""A recipe that is not carried out: its stages as commands, or tried for two steps with small shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignlab.launching import slurm
from alignlab.recipes.dry_run import dry_run_stages
from alignlab.recipes.plan import Case, Planned, plan
from alignlab.recipes.work import prepare_files, shown
from alignlab.request import Request, emit


def print_commands(request: Request, cases: Sequence[Case], home: Path) -> int:
    """Write each stage's file of settings and print its command, for a training with the batch job's options."""
    found = []
    for case in cases:
        stages = plan(case, home)
        print(f"# {case.scale.recipe} scale={case.scale.name} seed={case.seed}: {case.scale.title}")
        print(f"# {case.scale.hardware or 'hardware: not stated'}. Nothing was started; execute=true does the stages.")
        for name, one in stages.items():
            prepare_files(one)
            after = f", after {', '.join(one.needs)}" if one.needs else ""
            print(f"\n# {name} ({one.spec.kind}{after})")
            batch = _batch_options(one)
            if batch:
                print(f"#SBATCH {batch}")
            print(shown(one), flush=True)
            found.append(
                {"recipe": case.scale.recipe, "stage": name, "commands": [shown(one)], "sbatch": batch or None}
            )
        print()
    emit(request, {"path": str(home), "stages": found})
    return 0


def _batch_options(one: Planned) -> str:
    """The options of the job that ``launch=sbatch`` would submit for a training."""
    if one.spec.kind != "train" or one.request is None:
        return ""
    launch = one.request.config.launch
    script = slurm.script(launch, one.folder.name, [], str(one.folder / "slurm-%j.log"), str(Path.cwd()))
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return " ".join(options)


def try_out(request: Request, cases: Sequence[Case], home: Path) -> int:
    """Compose, check and take two steps of every training stage; raises what the first one that fails raises."""
    found: list[dict[str, Any]] = []
    for case in cases:
        stages = plan(case, home)
        print(f"recipe   {case.scale.recipe}   scale={case.scale.name}   two steps of each training, shapes cut down")
        with tempfile.TemporaryDirectory(prefix="alignlab-") as folder:
            for name, tried in dry_run_stages(stages, Path(folder) / "dry"):
                losses = " -> ".join(f"{loss:.4g}" for loss in tried.losses)
                print(f"stage    {name:<24} loss {losses}   {tried.model}", flush=True)
                found.append({"recipe": case.scale.recipe, "stage": name, **tried.as_json()})
    emit(request, {"stages": found})
    return 0
