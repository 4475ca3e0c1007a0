"""A composed configuration turned into the objects of one job; shared by training, probing and evaluation.

Two halves: :func:`prepare_data` needs no device and no process group; :func:`assemble` runs in every worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignlab import dist
from alignlab.config import DataConfig, ModelConfig, RootConfig
from alignlab.configuration.shadows import Probe, probes
from alignlab.data.bins import USUAL, Cost
from alignlab.data.index import Index
from alignlab.data.loader import Loader
from alignlab.data.overlap import Overlap, compare
from alignlab.data.pack import plain_form
from alignlab.data.plan import StepPlans, sequential
from alignlab.data.prepare import Prepared, prepare
from alignlab.data.sources import Needs, holds_out
from alignlab.data.template import Encoder
from alignlab.engine.base import make_engine
from alignlab.errors import DataError
from alignlab.models import kernel
from alignlab.models.adapters import apply_peft
from alignlab.models.compiled import compile_layers
from alignlab.models.flops import ModelFlops
from alignlab.models.liger import apply_liger
from alignlab.models.load import Loaded, disable_dropout, load_model, resolve_dtype
from alignlab.models.proof import choose_layout
from alignlab.models.scorer import Scorer
from alignlab.models.source import max_positions
from alignlab.models.tokens import check_same_tokens, check_token_ids, load_tokenizer
from alignlab.registry import OBJECTIVES
from alignlab.train.reference import Reference, reference_logps
from alignlab.train.shadow import Shadow
from alignlab.types import Unit

TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}
"""Tokens in a micro-batch when nothing is said; a speed setting."""


@dataclass
class JobData:
    """Everything on the host's side of a job."""

    objective: Any
    needs: Needs
    tokenizer: Any
    encoder: Encoder
    train: Prepared
    held_out: Prepared | None
    overlap: Overlap
    """of the training rows with the held-out rows"""
    probes: list[Probe]
    """the rows of ``eval.shadow``"""

    def accounts(self) -> dict[str, Any]:
        """The manifests of both sides, and what they share."""
        found: dict[str, Any] = {"train": self.train.manifest}
        if self.held_out is not None:
            found |= {"held_out": self.held_out.manifest, "overlap": dict(self.overlap.counts)}
        return found | {f"shadow/{'+'.join(probe.objectives)}": probe.rows.manifest for probe in self.probes}

    def findings(self) -> Iterator[dict[str, Any]]:
        """What was kept and is suspect, an entry each; ``rows`` says whether it stands in one side's or in both."""
        for side, prepared in (("train", self.train), ("held_out", self.held_out)):
            for entry in prepared.findings() if prepared else ():
                yield {**entry, "rows": side}
        for entry in self.overlap.entries:
            yield {**entry, "rows": "both"}


@dataclass
class Job:
    """Everything in a worker."""

    config: RootConfig
    data: JobData
    loaded: Loaded
    engine: Any
    scorer: Scorer
    plans: StepPlans
    loader: Loader
    held_plans: StepPlans | None
    held_loader: Loader | None
    shadows: list[Shadow]
    layout_line: str


def make_objective(config: RootConfig) -> Any:
    """The configured objective."""
    return OBJECTIVES.get(config.objective.name)(config.objective)


def needs_of(objective: Any) -> Needs:
    """What the data must hold for an objective."""
    stage = getattr(objective, "stage", None)
    if stage:
        world_kind = "scored"
    elif objective.head == "scalar":
        world_kind = "trees"
    else:
        world_kind = "pairs" if objective.example is Unit.PAIR or objective.mismatched else "demonstrations"
    return Needs(objective.example, objective.mismatched, stage, world_kind)


def make_encoder(model: ModelConfig, data: DataConfig) -> tuple[Any, Encoder]:
    """(tokenizer or None, encoder with the template, lengths and policies of the configuration)."""
    tokenizer = load_tokenizer(model)
    if data.max_length == "auto":
        length = max_positions(model)
    else:
        length = int(data.max_length)
    encoder = Encoder(
        tokenizer,
        chat_template=model.chat_template,
        max_length=length,
        overlong=data.overlong,
        history_reasoning=data.history_reasoning,
    )
    return tokenizer, encoder


def prepare_data(config: RootConfig) -> JobData:
    """Prepare (or find in the cache) the rows of a job; no device, no process group."""
    objective = make_objective(config)
    needs = needs_of(objective)
    tokenizer, encoder = make_encoder(config.model, config.data)
    held, leaks = None, config.data.leaks
    if holds_out(config.data):
        held = prepare(config.data, needs, encoder, held_out=True, seed=config.seed)
    rows = prepare(config.data, needs, encoder, seed=config.seed, without=held if leaks == "drop" else None)
    overlap = compare(rows.examples(), held.examples()) if held is not None else Overlap()
    if leaks == "error" and overlap.counts["leak"]:
        raise DataError(_leak(overlap))
    if held is not None and config.eval.limit is not None:
        held = replace(held, index=held.index.select(range(min(config.eval.limit, len(held.index)))))
    return JobData(objective, needs, tokenizer, encoder, rows, held, overlap, probes(config, encoder, needs_of))


def _leak(overlap: Overlap) -> str:
    first = next(entry for entry in overlap.entries if entry["finding"] == "leak")
    return (
        f"{first['file']}: line {first['line']}: the same example is held out ({first['other']['file']}: line "
        f"{first['other']['line']}), {overlap.counts['leak']} in all; data.leaks=drop leaves them out of training, "
        "data.leaks=keep goes on"
    )


def check_flags(data: JobData) -> None:
    """Raises DataError where the objective needs flagged pairs and no training pair is."""
    objective, values = data.objective, data.train.index.pair_values
    flag = getattr(objective, "needs_flag", None)
    if flag is not None and not values[flag].any():
        raise DataError(
            f"objective={objective.name}: its term for pairs flagged '{flag}' would never act, as none of the "
            f"{len(values[flag]):,} training pairs is; set data.{flag}=true or a source's {flag}"
        )


def assemble(config: RootConfig, data: JobData) -> Job:
    """Model, layout, engine, step plans and loaders of this rank; the process group stands already."""
    objective = data.objective
    device = dist.device()
    dtype = resolve_dtype(config.model.dtype, device)
    loaded = load_model(config.model, objective.head, dtype, config.seed)
    for prepared in (data.train, data.held_out, *(probe.rows for probe in data.probes)):
        if prepared is not None:
            counted = prepared.manifest
            check_token_ids(loaded.model, counted["largest_token"], counted["largest_at"], loaded.name)
    disable_dropout(loaded.model)
    layout, line = choose_layout(
        loaded.model, config.model.layout, form=plain_form(device),
        mixes_inputs=objective.mixes_inputs or any(probe.objective.mixes_inputs for probe in data.probes),
    )  # fmt: skip
    takes_ragged = kernel.takes_ragged(loaded.model, layout, dtype, device)
    if config.model.use_liger_kernel:
        apply_liger(loaded.model, device)
    model = apply_peft(loaded.model, config.peft, objective.head, config.seed)
    scorer = Scorer(model, objective.head, layout)
    engine = make_engine(
        config.engine.name, scorer, config.optim, config.engine, dtype, config.train.gradient_checkpointing
    )
    form, attention_line = _attention_form(engine, scorer, dtype, *takes_ragged)
    line = "; ".join(filter(None, (line, attention_line)))
    if config.train.torch_compile:
        compile_layers(model, engine.device)
    engine.train()  # a model read from a folder comes in eval mode, in which no activation is ever recomputed
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer is not None else None

    def loader(index: Index, objective: Any = objective) -> Loader:
        return Loader(
            index, layout, engine.device, torch.float64 if dtype == torch.float64 else torch.float32, engine.rank,
            mixes_inputs=objective.mixes_inputs, pad_id=pad or 0, merge_prompts=shared["merge_prompts"],
            max_length=data.encoder.max_length, form=form,
        )  # fmt: skip

    shared = limits_of(config, objective, loaded.model, layout, engine.dp, engine.device)
    index = data.train.index
    plans = training_plans(config, index, shared)
    held_plans = held_loader = None
    if data.held_out is not None:
        held_plans = whole_set(data.held_out.index, config.seed, shared)
        held_loader = loader(data.held_out.index)
    shadows = [
        Shadow(
            probe.objectives, whole_set(probe.rows.index, config.seed, shared | _wants(probe.objective)),
            loader(probe.rows.index, probe.objective),
        )
        for probe in data.probes
    ]  # fmt: skip
    return Job(config, data, loaded, engine, scorer, plans, loader(index), held_plans, held_loader, shadows, line)


def limits_of(
    config: RootConfig, objective: Any, model: Any, layout: str, dp: int, device: torch.device
) -> dict[str, Any]:
    """How the steps of a job are cut into micro-batches: what all of its plans share.

    ``model`` carries its adapters and may be on the meta device.
    """
    return {
        **_wants(objective),
        "token_budget": config.train.token_budget or TOKEN_BUDGET[device.type],
        "max_examples": config.train.per_device_train_batch_size,
        "dp": dp,
        "layout": layout,
        "merge_prompts": config.data.merge_prompts != "false",
        "cost": cost_of(model),
    }


def training_plans(config: RootConfig, index: Index, limits: dict[str, Any]) -> StepPlans:
    """The optimizer steps of a job; ``limits`` are :func:`limits_of`'s."""
    return StepPlans(
        index, global_batch_size=config.train.global_batch_size, seed=config.seed,
        epochs=config.train.num_train_epochs, max_steps=config.train.max_steps,
        group_prompts=config.data.merge_prompts == "global", **limits,
    )  # fmt: skip


def _wants(objective: Any) -> dict[str, Any]:
    """What an objective asks of a step plan."""
    return {"unit": objective.example, "mismatched": objective.mismatched, "mixes_inputs": objective.mixes_inputs}


def cost_of(model: Any) -> Cost:
    """What a model's shape makes of tokens, visible keys and scored rows; the default where it is no shape we know."""
    try:
        flops = ModelFlops.of(model)
    except AttributeError:
        return USUAL
    return Cost(flops.matmul, sum(flops.attention.values()), flops.head)


def _attention_form(engine: Any, scorer: Scorer, dtype: torch.dtype, takes: bool, why: str) -> tuple[str, str]:
    """(the form of this job's attention plans, one of ``data.pack.FORMS``; what is said of it).

    ``takes`` and ``why`` are :func:`kernel.takes_ragged`'s.  Collective: all ranks get the same answer.
    """
    if not why:
        return plain_form(engine.device), ""
    if all(dist.all_gather_object(takes)):
        batch = kernel.comparison_batch(scorer.inner, scorer.layout, engine.device)
        engine.train(False)
        found = kernel.difference(engine.score, batch, scorer.head)
        if all(dist.all_gather_object(kernel.agrees(found, dtype))):
            return "ragged", f"attention by {why}"
        why = f"{why} and padded groups differ by {found:.1g}"
    return "padded", f"attention in padded groups ({why})"


def whole_set(index: Index, seed: int, shared: dict[str, Any]) -> StepPlans:
    """One step that holds every example of ``index``."""
    count = index.example_count(shared["unit"])
    if count == 0:
        raise DataError(f"the held-out rows hold no {shared['unit'].value} for this objective")
    return StepPlans(index, global_batch_size=count, seed=seed, epochs=1, max_steps=None, **shared)


def attach_reference(job: Job, say: Callable[[str], None] | None = None) -> float:
    """Give the loaders the reference log-probabilities; returns the seconds this job spent on computing them.

    ``say`` is told, once, when another job is computing them and this one waits.
    Must run while the engine still holds the policy as loaded: before any checkpoint is read.
    """
    asked: list[tuple[Loader, Any, Prepared]] = []
    if job.data.objective.needs_reference:
        asked.append((job.loader, job.plans, job.data.train))
        if job.held_loader is not None and job.data.held_out is not None:
            asked.append((job.held_loader, job.held_plans, job.data.held_out))
    for shadow, probe in zip(job.shadows, job.data.probes, strict=True):
        if probe.needs_reference:
            asked.append((shadow.loader, shadow.plans, probe.rows))
    if not asked:
        return 0.0
    source = reference_job(job)
    compute = source is job or dist.world_size() == 1
    told = {} if say is None else {"say": say}
    seconds = 0.0
    for loader, plans, prepared in asked:
        seconds += _attach(source, loader, plans, prepared, compute=compute, **told)
    return seconds


def _attach(source: Job, loader: Loader, plans: Any, prepared: Prepared, *, compute: bool, **told: Any) -> float:
    # Plans are made as they are consumed: a pass found in the cache costs none.
    mismatched = (plans.at(step) for step in range(plans.total_steps)) if plans.mismatched else None
    partners = [source.config.seed, plans.global_batch_size, plans.total_steps, *["grouped"] * plans.group_prompts]
    parts = {
        "model": source.loaded.fingerprint,
        "index": prepared.index.hash,
        "dtype": str(source.loaded.dtype),
        "peft": None if source.config.peft.name == "none" else [source.loaded.fingerprint, vars(source.config.peft)],
        "mismatched": None if mismatched is None else partners,
    }
    everything = partial(
        sequential, prepared.index, unit=plans.unit, token_budget=plans.limits.token_budget,
        dp=plans.limits.dp, layout=source.scorer.layout, mixes_inputs=plans.limits.mixes_inputs,
        merge_prompts=plans.limits.merge_prompts, cost=plans.limits.cost,
    )  # fmt: skip
    found: Reference = reference_logps(
        source.engine,
        loader,
        everything,
        parts,
        prepared.index.num_sequences,
        mismatched,
        compute=compute,
        name=loader.text_of,
        **told,
    )
    loader.values["reference"] = found.sequences
    loader.mismatched_values["reference"] = found.mismatched
    return found.seconds


def reference_job(job: Job) -> Job:
    """The job whose model is the reference: ``job`` itself, as loaded, or one around the model the user named."""
    name = job.config.reference.name_or_path
    return job if name is None else _named_reference(job, name)


def reference_model(model: ModelConfig, name: str) -> ModelConfig:
    """The section of the model ``name``, which is the reference of the policy ``model``."""
    revision = model.revision if name == model.name_or_path else None
    # Trust was given to the policy's code; of another model only to a folder that lies here to be read.
    trusted = model.trust_remote_code and (name == model.name_or_path or Path(name).is_dir())
    return replace(model, name_or_path=name, revision=revision, layout="auto", trust_remote_code=trusted)


def _named_reference(job: Job, name: str) -> Job:
    """A job like ``job`` around the reference model the user named, with a plain engine that never trains.

    With several ranks only what identifies the model is its own: the numbers have to be in the cache already.
    """
    model = job.config.model
    config = replace(job.config, model=reference_model(model, name), peft=replace(job.config.peft, name="none"))
    if model.tokenizer_name_or_path is None:  # else it serves both
        check_same_tokens(job.data.tokenizer, load_tokenizer(config.model), name)
    if dist.world_size() > 1:
        loaded = load_model(config.model, job.data.objective.head, job.loaded.dtype, config.seed)
        return replace(job, config=config, loaded=loaded)
    return assemble(config, job.data)
