"""``alignlab plan``: memory, steps and cost of a training before it starts; no GPU, no weights.

Takes what ``train`` takes and checks it as ``train`` does.  Rows are prepared, or found in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignlab import liveness
from alignlab.config import RootConfig
from alignlab.configuration import names
from alignlab.data.plan import StepPlans
from alignlab.errors import AlignlabError, ConfigError
from alignlab.measuring.budget import Counter, Estimate, Work, hours, peak_of
from alignlab.measuring.memory import ModelStates, gib, model_states
from alignlab.models.flops import ModelFlops
from alignlab.models.proof import choose_layout
from alignlab.models.skeleton import Skeleton, skeleton, with_adapters
from alignlab.registry import OBJECTIVES
from alignlab.request import Request, emit
from alignlab.runs.job import JobData, check_flags, limits_of, prepare_data, reference_model, training_plans
from alignlab.types import Unit
from alignlab.validation import Placement, missing_packages, placement
from alignlab.verbs.options import own_options

ACTIVATIONS = "not estimated: activations and logits, which come on top"


@dataclass
class Options:
    """The verb's own settings."""

    gpu: str | None = None
    """The GPU that the training will have, e.g. H100: bf16 and a GPU's token budget where not stated, and hours."""
    mfu: float = 0.4
    """Share of the GPU's published rate that the model's own work is assumed to reach."""
    dollars_per_gpu_hour: float | None = None
    steps: int = 100
    """So many optimizer steps are counted, a seeded sample of a longer run; 0: all."""


@dataclass(frozen=True)
class Outlook:
    """Everything that is said."""

    config: RootConfig
    options: Options
    where: Placement
    data: JobData
    plans: StepPlans
    layout: str
    parameters: tuple[int, int]
    """(all, trained)"""
    states: ModelStates
    work: Work


def run(request: Request) -> int:
    """Print the plan; ``--json`` has the same figures unrounded, bytes and operations."""
    options = own_options(request, Options)
    config: RootConfig = request.config
    liveness.gate(request)
    _check(request, options)
    found = outlook(config, options)
    print("\n".join(f"{head:<8} {text}".rstrip() for head, text in lines(found)))
    emit(request, as_json(found))
    return 0


def _check(request: Request, options: Options) -> None:
    problems = list(missing_packages(request.config))
    if not 0 < options.mfu <= 1:
        problems.append(f"mfu={options.mfu:g}: a share of the published rate, above 0 and at most 1")
    if options.steps < 0:
        problems.append(f"steps={options.steps}: a number of steps, or 0 for all")
    if options.dollars_per_gpu_hour is not None and options.dollars_per_gpu_hour < 0:
        problems.append(f"dollars_per_gpu_hour={options.dollars_per_gpu_hour:g}: 0 or more")
    for key in ("mfu", "dollars_per_gpu_hour"):
        if key in request.own and options.gpu is None:
            problems.append(f"{key}: says nothing without gpu=NAME")
    if options.gpu is not None:
        try:
            peak_of(options.gpu)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def outlook(config: RootConfig, options: Options) -> Outlook:
    """Prepare the rows, count the steps, add up the memory."""
    where = placement(config, gpu=options.gpu is not None)
    if options.gpu is not None and where.dtype != torch.bfloat16:
        raise ConfigError(f"gpu={options.gpu}: its published rate is that of bf16, and model.dtype is {_dtype(where)}")
    data = prepare_data(config)
    check_flags(data)
    objective = data.objective
    base = skeleton(config.model, objective.head, where.dtype)
    mixes = objective.mixes_inputs or any(probe.objective.mixes_inputs for probe in data.probes)
    layout, _ = choose_layout(base, config.model.layout, mixes_inputs=mixes)
    model = with_adapters(base, config.peft, objective.head)
    flops = ModelFlops.of(model.module)
    plans = training_plans(
        config, data.train.index, limits_of(config, objective, base, layout, where.ranks, where.device)
    )
    counter = Counter(
        config, objective, data.train.index, plans, flops, _reference_flops(config, data, where, flops),
        data.encoder.max_length, liveness.made_up,
    )  # fmt: skip
    try:
        work = counter.count(options.steps)
    except AlignlabError:
        raise
    except Exception as error:
        if OBJECTIVES.is_builtin(objective.name):
            raise
        raise ConfigError(
            f"objective={objective.name} cannot be counted with made-up scores: {type(error).__name__}: {error}"
        ) from error
    states = model_states(
        model.module, model.packed, where.engine, where.ranks, where.dtype, config.optim,
        config.engine.offload_optimizer,
    )  # fmt: skip
    return Outlook(config, options, where, data, plans, layout, _parameters(model), states, work)


def _reference_flops(config: RootConfig, data: JobData, where: Placement, own: ModelFlops) -> ModelFlops:
    """The shape of the reference: the policy's own, adapters included, or that of the model the user named."""
    name = config.reference.name_or_path
    if not data.objective.needs_reference or name is None or name == config.model.name_or_path:
        return own
    return ModelFlops.of(skeleton(reference_model(config.model, name), data.objective.head, where.dtype))


def _parameters(model: Skeleton) -> tuple[int, int]:
    counts = [(p.numel(), p.requires_grad) for p in model.module.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


# ---------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------


def lines(found: Outlook) -> list[tuple[str, str]]:
    """(head, text) of each line of the page."""
    where, manifest = found.where, found.data.train.manifest
    total, trained = found.parameters
    dropped = manifest["read"] - manifest["kept"]
    reasons = ", ".join(f"{name} {n:,}" for name, n in sorted(manifest["dropped"].items()))
    ranks = f"{where.ranks} rank{'s' * (where.ranks > 1)}"
    named = found.options.gpu
    device = peak_of(named)[0] if named else "a GPU" if where.device.type == "cuda" else "a CPU"
    return [
        ("plan", names.run_name(found.config)),
        ("for", f"{ranks} on {device}, engine {where.engine}, {_dtype(where)}, layout {found.layout}"),
        ("model", f"{total / 1e6:,.1f}M parameters" + (f", {trained / 1e6:,.2f}M trained" if trained < total else "")),
        ("data", f"{manifest['read']:,} read = {manifest['kept']:,} kept + {dropped:,} dropped"
         + (f" ({reasons})" if dropped else "")),
        *_step_lines(found),
        *_memory_lines(found),
        *_work_lines(found),
    ]  # fmt: skip


def _dtype(where: Placement) -> str:
    return str(where.dtype).removeprefix("torch.")


def _step_lines(found: Outlook) -> list[tuple[str, str]]:
    config, work = found.config, found.work
    units = "pairs" if found.data.objective.example is Unit.PAIR else "sequences"
    counted = "all counted" if work.complete else f"{len(work.planned)} of them counted, seed {config.seed}"
    rows = [
        ("micro-batches a rank", "micro_batches", ",.1f"), ("tokens", "tokens", ",.0f"),
        ("computed", "computed", ",.0f"), ("scored", "scored", ",.0f"),
        ("largest micro-batch", "largest", ",.0f"),
    ]  # fmt: skip
    table = [("", f"{'a step':<22}{'mean':>12}{'most':>12}")]
    table += [("", f"{label:<22}{work.mean(name):>12{form}}{work.most(name):>12,}") for label, name, form in rows]
    if found.where.ranks > 1:
        for label, name in (("fillers", "filler_share"), ("slowest rank", "imbalance")):
            table.append(("", f"{label:<22}{work.mean(name):>12.1%}{work.most(name):>12.1%}"))
    epochs = f"{work.epochs:.3g} epoch{'s' * (work.epochs != 1)}"
    steps = f"{work.total_steps:,} of {config.train.global_batch_size:,} {units}, {epochs} ({counted})"
    return [("steps", steps), *table]


def _memory_lines(found: Outlook) -> list[tuple[str, str]]:
    states, work, train = found.states, found.work, found.config.train
    device, host = gib(states.device), gib(states.host)
    columns = [("device", device), *([("host", host)] if states.host else [])]
    order = [name for name in ("parameters", "master weights", "gradients", "optimizer", "buffers", "total")
             if name in device or name in host]  # fmt: skip
    lines = [("memory", f"{'GiB on one rank':<22}" + "".join(f"{head:>12}" for head, _ in columns))]
    lines += [("", f"{n:<22}" + "".join(f"{part.get(n, 0):>12.3f}" for _, part in columns)) for n in order]
    if states.gathered:
        lines.append(
            ("", f"and at most {states.gathered / 2**30:.3g} GiB of gathered parameters while a layer computes")
        )
    if found.data.objective.needs_reference:
        lines.append(("", f"reference: {_reference_text(found)}"))
    inner = "recomputed" if train.gradient_checkpointing else "kept (train.gradient_checkpointing=false)"
    bound = f"up to {int(work.most('largest')):,} tokens a micro-batch (train.token_budget), inner ones {inner}"
    return [*lines, ("", ACTIVATIONS), ("", f"what bounds them: {bound}")]


def _reference_text(found: Outlook) -> str:
    name = found.config.reference.name_or_path
    if name is None:
        return "none in memory while training: the policy scores the rows once, before the first step"
    if found.where.ranks > 1:
        return f"none in memory: {name} scores the rows beforehand, in 'alignlab prepare ... reference=true'"
    return f"none in memory while training: {name} is loaded beside the policy to score the rows, before the first step"


def _work_lines(found: Outlook) -> list[tuple[str, str]]:
    work = found.work
    training = work.total("flops")
    text = f"{_flops(training)} floating point operations in training"
    if found.data.objective.needs_reference:
        text += f", {_flops(work.reference)} in the reference pass (none where it is cached)"
    rows = [("work", text), ("", "evaluation, generation and checkpoints are not in it")]
    cost = _cost(found)
    if cost is None:
        return rows
    said = f"{_duration(cost['hours'])} on {found.where.ranks} {cost['gpu']} = {cost['gpu_hours']:.3g} GPU-hours"
    if "dollars" in cost:
        said += f" = {cost['dollars']:,.2f} dollars"
    return [*rows, ("time", f"{said}, if the model's own work reaches {cost['mfu']:.0%} of the published rate")]


def _duration(hours: float) -> str:
    seconds = hours * 3600
    unit, size = ("hours", 3600) if seconds >= 3600 else ("minutes", 60) if seconds >= 60 else ("seconds", 1)
    return f"{seconds / size:.3g} {unit}"


def _flops(estimate: Estimate) -> str:
    return f"{estimate.total:.3g}" + (f" ± {1.96 * estimate.error:.2g}" if estimate.error else "")


def _cost(found: Outlook) -> dict[str, Any] | None:
    """Hours and dollars under the assumed MFU; None where no GPU is named."""
    options, where = found.options, found.where
    if options.gpu is None:
        return None
    gpu, rate = peak_of(options.gpu)
    wall = hours(found.work.total("flops").total + found.work.reference.total, where.ranks, rate, options.mfu)
    cost: dict[str, Any] = {
        "gpu": gpu,
        "mfu": options.mfu,
        "rate": rate,
        "hours": wall,
        "gpu_hours": wall * where.ranks,
    }
    if options.dollars_per_gpu_hour is not None:
        cost["dollars"] = cost["gpu_hours"] * options.dollars_per_gpu_hour
    return cost


def as_json(found: Outlook) -> dict[str, Any]:
    """The same in plain numbers: bytes, operations, shares."""
    work, states, where = found.work, found.states, found.where
    of_step = {
        name: {"mean": work.mean(name), "most": work.most(name)}
        for name in ("micro_batches", "tokens", "computed", "scored", "largest", "filler_share", "imbalance", "flops")
    }
    sums = {name: work.total(name)._asdict() for name in ("tokens", "computed", "scored", "flops")}
    return {
        "run": names.run_name(found.config),
        "engine": where.engine, "ranks": where.ranks, "device": where.device.type, "dtype": _dtype(where),
        "layout": found.layout, "token_budget": found.plans.limits.token_budget,
        "parameters": {"all": found.parameters[0], "trained": found.parameters[1]},
        "data": found.data.accounts(),
        "steps": {
            "total": work.total_steps, "epochs": work.epochs, "global_batch_size": found.plans.global_batch_size,
            "counted": [step + 1 for step in work.planned], "a_step": of_step, "sum": sums,
        },
        "memory": {"device": states.device, "host": states.host, "gathered_at_most": states.gathered},
        "flops": {"training": sums["flops"], "reference": work.reference._asdict()},
        "cost": _cost(found),
    }  # fmt: skip
