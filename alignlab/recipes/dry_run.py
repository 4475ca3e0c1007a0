"""Two optimizer steps of a configuration with its shapes cut down: does what it says run at all?

Kept as set: the objective, the optimizer and its schedule, the adapter, the dtype, the layout, activation
checkpointing, conditions.  Cut down: the model (:mod:`alignlab.models.standin`), the rows (made up, in the form that
the objective eats), the batch, the engine (``local``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignlab import dist
from alignlab.config import ConditionConfig, DataConfig, EngineConfig, EvalConfig, ReferenceConfig, RootConfig
from alignlab.durable import write_atomic
from alignlab.errors import AlignlabError
from alignlab.launching.launch import captured_output
from alignlab.mappings import temporary_entry
from alignlab.models.standin import write_standin
from alignlab.recipes.plan import Planned
from alignlab.runfolder import RunFolder
from alignlab.runs.export import export_model
from alignlab.runs.job import Job, assemble, attach_reference, make_objective, needs_of, prepare_data
from alignlab.train.loop import Progress, StepReport, fit
from alignlab.worker import library_log

STEPS, BATCH = 2, 4
RATINGS = (1.0, 2.0, 3.0, 4.0, 5.0)
"""Levels of a dimension for which the configuration declares none."""


@dataclass(frozen=True)
class DryRun:
    """What became of it: the loss and the gradient's norm of each step, what the model was, where its export lies."""

    losses: list[float]
    grad_norms: list[float]
    model: str
    folder: Path

    def as_json(self) -> dict[str, Any]:
        return {"steps": len(self.losses), "losses": self.losses, "grad_norms": self.grad_norms, "model": self.model}


def dry_run(config: RootConfig, folder: Path, start: Path | None = None) -> DryRun:
    """Train two steps of ``config`` and export, below ``folder``, which must be new; ``start``: a model to begin with.

    Raises what the training would raise.  Opens no connection, leaves nothing in the cache, and what libraries have to
    say goes to ``folder/log.txt``.
    """
    folder.mkdir(parents=True)
    log = RunFolder(folder)
    own_cache = temporary_entry(os.environ, "ALIGNLAB_CACHE", str(folder / "cache"))
    with captured_output(log, 0), library_log(log, 0), own_cache:
        said = "the model of the stage before"
        if start is None:
            start = folder / "model"
            said = write_standin(config.model, start)
        cut = _cut_down(config, start, folder)
        dist.init(timeout=cut.engine.timeout)
        job = assemble(cut, prepare_data(cut))
        try:
            return _trained(job, said, folder / "export" / "model")
        finally:
            job.engine.close()


def dry_run_stages(stages: Mapping[str, Planned], folder: Path) -> Iterator[tuple[str, DryRun]]:
    """(name, what became of it) of every training stage of a planned recipe, each started from the one it names.

    An error says which stage it is of.
    """
    done: dict[str, DryRun] = {}
    for name, planned in stages.items():
        if planned.spec.kind not in ("train", "loop") or planned.request is None:
            continue
        start = done[planned.spec.start].folder if planned.spec.start else None
        try:
            done[name] = dry_run(planned.request.config, folder / name, start)
        except AlignlabError as error:
            raise type(error)(f"{planned.spec.file}: stages.{name}: dry run: {error}") from None
        yield name, done[name]


def _trained(job: Job, said: str, target: Path) -> DryRun:
    attach_reference(job)
    recorder = _Recorder()
    config = job.config
    fit(
        job.engine, job.data.objective, job.plans, job.loader, config.optim, config.train, config.seed, Progress(),
        recorder,
    )  # fmt: skip
    export_model(job, target)
    return DryRun(recorder.losses, recorder.grad_norms, said, target)


class _Recorder:
    """The loop's hooks: keeps what every step gave."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def after_step(self, report: StepReport) -> bool:
        metrics = report.metrics or {}
        self.losses.append(metrics["loss"])
        self.grad_norms.append(metrics["grad_norm"])
        return False


def _cut_down(config: RootConfig, model: Path, folder: Path) -> RootConfig:
    """The settings of a dry run; ``model`` is the small one's folder."""
    return replace(
        config,
        model=replace(
            config.model, name_or_path=str(model), revision=None, tokenizer_name_or_path=None, chat_template=None,
            attn_implementation="sdpa", use_liger_kernel=False, trust_remote_code=False,
        ),
        data=_data(config, folder),
        engine=EngineConfig("local"),
        reference=ReferenceConfig(),
        eval=EvalConfig(),
        train=replace(
            config.train, global_batch_size=BATCH, max_steps=STEPS, per_device_train_batch_size=None, token_budget=None,
            torch_compile=False, logging_steps=1,
        ),
    )  # fmt: skip


def _data(config: RootConfig, folder: Path) -> DataConfig:
    """Made-up rows in the form that the objective eats, under the conditions that are configured."""
    old, needs = config.data, needs_of(make_objective(config))
    rows: dict[str, Any] = {
        "path": "sums", "options": {"kind": needs.world_kind, "rows": 24},
        "absolute": old.absolute or any(source.absolute for source in old.sources),
    }  # fmt: skip
    if needs.stage and dimensions_of(old.condition):
        file = folder / "rows.jsonl"
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in rated_rows(old.condition)))
        rows = {"path": str(file)}
    return DataConfig(
        **rows, condition=old.condition, history_reasoning=old.history_reasoning, merge_prompts=old.merge_prompts,
        num_proc=1,
    )  # fmt: skip


def dimensions_of(condition: ConditionConfig) -> list[str]:
    """Every dimension that a configuration of conditions names."""
    named = [*condition.dimensions, *condition.levels]
    named += [name for bucket in condition.buckets for name in bucket.get("condition", {})]
    return list(dict.fromkeys(named))


def rated_rows(condition: ConditionConfig) -> Iterator[dict[str, Any]]:
    """Made-up prompts with four rated answers each, two for every bucket, whose first answer is what it asks for."""
    dimensions, rng = dimensions_of(condition), np.random.default_rng(0)
    levels = {name: condition.levels.get(name) or list(RATINGS) for name in dimensions}
    for number, wanted in enumerate([bucket.get("condition", {}) for bucket in condition.buckets or [{}] * 6] * 2):
        answers = []
        for place in range(4):
            ratings = {name: float(rng.choice(levels[name])) for name in dimensions}
            if place == 0:
                ratings |= {name: float(level) for name, level in wanted.items() if level != "any"}
            marks = {name: {"Rating": f"{level:g}"} for name, level in ratings.items()}
            answers.append({"response": f"Answer {place} to it, {rng.integers(1000)}.", "annotations": marks})
        yield {"instruction": f"Question {number}?", "completions": answers}
