"""What doing a stage means: an alignlab command, or a function of the recipe's own file, in a process of its own."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignlab import stages
from alignlab.durable import write_atomic
from alignlab.processes import StopFlag
from alignlab.recipes.plan import Planned, settings_text, token
from alignlab.runfolder import RunFolder
from alignlab.verb_table import VERBS


def work_of(planned: Planned, stop: StopFlag) -> Callable[[Path], dict[str, Any]]:
    """``work(folder)`` of a planned stage; its result is what metrics' paths go into.

    train: the run's ``result.json`` (``before``, ``after``), ``steps``, ``model``.  evaluate, loop, sample, prepare:
    the verb's ``--json`` object.  run: what the function returns.
    """
    return {"train": _train, "run": _function}.get(planned.spec.kind, _verb)(planned, stop)


def command(planned: Planned) -> list[str]:
    """The command line that the stage stands for, a file of its settings being written beforehand."""
    kind = planned.spec.kind
    if kind == "run":
        file, _, name = planned.spec.function.partition(":")
        own = str(planned.spec.file.parent / file)
        return [sys.executable, "-m", "alignlab.recipes.child", own, name, str(planned.folder)]
    return ["alignlab", *_words(planned)]


def prepare_files(planned: Planned) -> None:
    """Write into the stage's folder what its command reads."""
    planned.folder.mkdir(parents=True, exist_ok=True)
    if planned.spec.kind == "run":
        models = {name: str(one.model or one.folder) for name, one in planned.needs.items()}
        order = {"models": models, "seed": planned.seed, "with": planned.filled()}
        write_atomic(planned.folder / "order.json", json.dumps(order, indent=1) + "\n")
    elif planned.request is not None:
        own = VERBS[planned.spec.kind].own
        values = {key: value for key, value in planned.filled().items() if key not in own}
        write_atomic(planned.folder / f"{planned.spec.kind}.yaml", settings_text(values))


def shown(planned: Planned) -> str:
    """The command as one types it."""
    return shlex.join(command(planned))


def _words(planned: Planned) -> list[str]:
    kind, settings = planned.spec.kind, planned.filled()
    if planned.request is None:
        target = [str(planned.needs[planned.spec.on].run)] if planned.spec.on else []
        return [kind, *target, *(token(key, value) for key, value in settings.items())]
    own = [token(key, value) for key, value in settings.items() if key in VERBS[kind].own]
    # A loop stands in ``loops`` beside its output folder.
    place = {"train": planned.folder, "loop": planned.folder / "runs"}.get(kind)
    where = [f"output_dir={place}", "run.name=run"] if place else []
    return [kind, str(planned.folder / f"{kind}.yaml"), *own, *where]


def _train(planned: Planned, stop: StopFlag) -> Callable[[Path], dict[str, Any]]:
    def work(folder: Path) -> dict[str, Any]:
        prepare_files(planned)
        found = stages.train_file(folder / "train.yaml", folder, stop)
        return {**json.loads((folder / "run" / "result.json").read_text(encoding="utf-8")), **found}

    return work


def _verb(planned: Planned, stop: StopFlag) -> Callable[[Path], dict[str, Any]]:
    def work(folder: Path) -> dict[str, Any]:
        prepare_files(planned)
        return stages.verb(_words(planned), folder, stop)

    return work


def _function(planned: Planned, stop: StopFlag) -> Callable[[Path], dict[str, Any]]:
    def work(folder: Path) -> dict[str, Any]:
        prepare_files(planned)
        return stages.answered(command(planned), folder / "answer.json", folder / "run.txt", stop)

    return work


def manifests(planned: Planned) -> dict[str, Any]:
    """The account of the rows that a training stage read; empty where there is none."""
    path = RunFolder(planned.run).data / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
