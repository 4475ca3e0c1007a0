"""One run of the matrix: the job that ``train`` would assemble, through the loop that trains, on a few rows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.data.plan import permutation, sequential
from alignlab.engine import checkpoint
from alignlab.engine.base import trainable
from alignlab.engine.shards import read_parameters
from alignlab.equivalence.cells import Run
from alignlab.equivalence.compare import ONE, Trace, distance, relative
from alignlab.equivalence.precision import whole_float64
from alignlab.errors import CheckFailed, ConfigError, DataError
from alignlab.runs.export import export_model
from alignlab.runs.job import Job, JobData, assemble, attach_reference, prepare_data, reference_job
from alignlab.train.loop import Progress, StepReport, fit
from alignlab.train.reference import sequence_logps
from alignlab.types import Ask, PackedBatch


@dataclass(frozen=True)
class Rows:
    """The rows of the matrix, prepared, and how many optimizer steps they are trained for."""

    data: JobData
    steps: int

    @classmethod
    def of(cls, config: RootConfig, rows: int, steps: int) -> Rows:
        """The first ``rows`` of the user's own first epoch.

        Raises DataError where they hold fewer than two examples a step: there would be nothing to accumulate.
        """
        data = replace(prepare_data(config), held_out=None)
        index = data.train.index
        first = permutation(len(index), config.seed, 0)[:rows]
        data = replace(data, train=replace(data.train, index=index.select(first)))
        found = cls(data, steps)
        if found.examples < 2 * steps:
            raise DataError(
                f"verify: {len(first)} rows hold {found.examples} example(s), and {steps} steps need at least "
                f"{2 * steps}; set rows=... higher or steps=... lower"
            )
        return found

    @property
    def examples(self) -> int:
        """What a global batch counts: pairs or sequences."""
        return self.data.train.index.example_count(self.data.objective.example)

    def twice(self) -> Rows:
        """Every second row, each two times."""
        index = self.data.train.index
        places = np.repeat(np.arange(0, len(index), 2), 2)
        return replace(self, data=replace(self.data, train=replace(self.data.train, index=index.select(places))))


def base_config(config: RootConfig) -> RootConfig:
    """The user's configuration without what only decides when something is written, and without a warm-up.

    Warm-up would give the first of a few steps the learning rate 0.
    """
    return replace(
        config,
        model=replace(config.model, use_liger_kernel=False),
        data=replace(config.data, eval_path=None, merge_prompts="false"),
        optim=replace(config.optim, warmup_steps=0),
        engine=replace(config.engine, offload_optimizer=False),
        train=replace(
            config.train, per_device_train_batch_size=None, gradient_checkpointing=False, torch_compile=False,
            logging_steps=1, eval_steps=None, save_steps=None, export_steps=None, nonfinite="stop",
        ),
    )  # fmt: skip


def configured(config: RootConfig, run: Run, rows: Rows) -> RootConfig:
    """``config`` with the settings of a run; the global batch is what the rows give for so many steps."""
    examples = rows.examples
    batch = examples if run.twice else examples // rows.steps
    settings = {**dict(run.settings), "train.global_batch_size": batch, "train.max_steps": rows.steps}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def execute(config: RootConfig, run: Run, rows: Rows, folder: Path, *, export: bool = False) -> Trace:
    """Train one way.  Collective; ``folder`` is made and gets the final parameters.

    ``export``: the model is exported at the end, opened by transformers and compared.  Raises ConfigError for a way
    this model, machine or installation cannot go.
    """
    with whole_float64(configured(config, run, rows).model.dtype):
        return _execute(config, run, rows, folder, export)


def _execute(config: RootConfig, run: Run, rows: Rows, folder: Path, export: bool) -> Trace:
    started = time.perf_counter()
    rows = rows.twice() if run.twice else rows
    config = configured(config, run, rows)
    dist.init(timeout=config.engine.timeout, group=config.engine.name != "local")
    if dist.is_main():
        folder.mkdir(parents=True)
    dist.barrier()
    trace = Trace(str(folder / "parameters.safetensors"))
    job = _job(config, rows, run)
    try:
        initial = _parameters(job, folder)
        progress = Progress()
        if run.path == "resumed":
            progress = _train(job, progress, trace, stop=rows.steps // 2)
            checkpoint.publish(folder, progress.step, job.engine.save, {"progress": asdict(progress)})
            job.engine.close()
            job = _job(config, rows, run)
            saved = checkpoint.newest_valid(folder).checkpoint
            if saved is None:
                raise CheckFailed("the checkpoint that was written is not valid")
            job.engine.load(saved.path)
            progress = Progress(**saved.meta["progress"])
        _train(job, progress, trace)
        final = _parameters(job, folder)
        if dist.is_main():
            trace.moved = distance(final, initial)
            save_file(final, trace.parameters)
        trace.tokens = sum(batch.input_ids.numel() for batch in job.loader.of(job.plans.at(0)))
        trace.micro_batches = [len(job.plans.at(step).bins) for step in range(job.plans.total_steps)]
        trace.dtype, trace.layout = str(job.loaded.dtype).removeprefix("torch."), job.scorer.layout
        trace.attention = job.scorer.inner.config._attn_implementation
        trace.recomputes = any(m.training and getattr(m, "gradient_checkpointing", False) for m in job.scorer.modules())
        if export:
            trace.scores = _export_difference(job, folder / "export")
    finally:
        job.engine.close()
    dist.barrier()
    trace.seconds = time.perf_counter() - started
    return trace


def _parameters(job: Job, folder: Path) -> dict[str, Tensor]:
    """The trained parameters in the precision of the update; empty but on rank 0.  Collective."""
    if job.loaded.dtype in (torch.float32, torch.float64):
        names = {name for name, _ in trainable(job.engine.module)}
        return {name: value for name, value in job.engine.full_state_dict().items() if name in names}
    state = folder / "state"  # the masters of low-precision parameters are in what the engine saves only
    if dist.is_main():
        state.mkdir()
    dist.barrier()
    job.engine.save(state)
    dist.barrier()
    if not dist.is_main():
        return {}
    found = read_parameters(state)
    shutil.rmtree(state)
    return found


def _job(config: RootConfig, rows: Rows, run: Run) -> Job:
    job = assemble(config, rows.data)
    if run.path == "live":
        if not job.data.objective.needs_reference:
            job.engine.close()
            raise ConfigError(f"{job.data.objective.name} needs no reference")
        frozen = reference_job(job)
        if frozen is job:
            frozen = assemble(config, rows.data)
        frozen.scorer.layout = job.scorer.layout  # it scores the micro-batches of the one that trains
        job.loader = LiveReference(job.loader, frozen)  # type: ignore[assignment]
    else:
        attach_reference(job)
    return job


class LiveReference:
    """A loader whose reference numbers come from a frozen model at the moment they are needed, micro-batch by
    micro-batch, in the training's own layout: no cache, no second plan, no order of rows to get wrong."""

    def __init__(self, loader: Any, frozen: Job) -> None:
        self._loader, self._frozen = loader, frozen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def of(self, plan: Any, select: str = "main") -> Iterator[PackedBatch]:
        """The loader's micro-batches, each scored on its way."""
        for batch in self._loader.of(plan, select):
            with torch.no_grad():
                logps = sequence_logps(self._frozen.engine.score, batch)
            precise = torch.float64 if logps.dtype == torch.float64 else torch.float32
            yield batch._replace(sequence_values={**batch.sequence_values, "reference": logps.to(precise)})


class _Recorder:
    """The loop's hooks: keeps what every step gave, and stops after ``stop`` steps."""

    def __init__(self, trace: Trace, stop: int | None) -> None:
        self._trace, self._stop = trace, stop

    def after_step(self, report: StepReport) -> bool:
        metrics = dict(report.metrics or {})
        self._trace.losses.append(metrics.pop("loss"))
        self._trace.grad_norms.append(metrics.pop("grad_norm"))
        self._trace.statistics.append(metrics)
        return report.progress.step == self._stop


def _train(job: Job, progress: Progress, trace: Trace, stop: int | None = None) -> Progress:
    config = job.config
    return fit(
        job.engine, job.data.objective, job.plans, job.loader, config.optim, config.train, config.seed, progress,
        _Recorder(trace, stop),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The export
# ---------------------------------------------------------------------------------------------------------------


def _export_difference(job: Job, folder: Path) -> float:
    """Largest relative difference, over all sequences, between this model's score and the exported folder's own.

    A score is the summed log-probability of the targets, or the reward; numbers below 1 count as 1.
    """
    export_model(job, folder)
    ours = _scores(job)
    try:
        theirs = _scores_in_transformers(job, folder)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(folder.with_name("adapter"), ignore_errors=True)
    return max(relative(value, theirs[number], ONE) for number, value in ours.items())


def _scores(job: Job) -> dict[int, float]:
    """By stored number of the sequence, through the scorer that trained."""
    limits = job.plans.shared()
    plan = sequential(job.data.train.index, **{**limits, "mismatched": False})
    found: dict[int, float] = {}
    job.engine.train(False)
    with torch.no_grad():
        for batch in job.loader.of(plan):
            if job.data.objective.head == "scalar":
                rewards = job.engine.score(batch, Ask("reward")).rewards
                assert rewards is not None
                values = rewards
            else:
                values = sequence_logps(job.engine.score, batch)
            found |= dict(zip(batch.sequence_ids.tolist(), values.tolist(), strict=True))
    return found


def _scores_in_transformers(job: Job, folder: Path) -> dict[int, float]:
    """By stored number, one row at a time through the unmodified model of the exported folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scalar = job.data.objective.head == "scalar"
    kind: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=job.loaded.dtype, trust_remote_code=False).to(job.engine.device).eval()
    index = job.data.train.index
    found: dict[int, float] = {}
    with torch.no_grad():
        for place in index.rows.tolist():
            for number in range(int(index.sample_ptr[place]), int(index.sample_ptr[place + 1])):
                sequence = index.sequence(number)
                ids = torch.from_numpy(sequence.tokens.astype(np.int64)).to(job.engine.device)[None]
                logits = model(input_ids=ids).logits
                if scalar:
                    found[number] = logits[0, 0].item()
                    continue
                precise = logits if logits.dtype == torch.float64 else logits.float()
                logps = precise[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                target = torch.from_numpy(sequence.target[1:].copy()).to(job.engine.device)
                found[number] = logps[target].sum().item()
    return found
