"""``alignlab evaluate RUN_OR_MODEL``: held-out loss and accuracy, and what a verifier says of generated answers.

With one of the verb's own keys it measures something else: ``rm=MODEL`` (:mod:`alignlab.verbs.evaluate_rewards`),
``control=true`` (:mod:`~alignlab.verbs.evaluate_control`), ``best_of=N`` (:mod:`~alignlab.verbs.evaluate_reranking`),
``judge=MODEL`` (:mod:`~alignlab.verbs.evaluate_judge`), ``tasks=NAMES`` (:mod:`~alignlab.verbs.evaluate_tasks`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.configuration import schema
from alignlab.data.sources import holds_out
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError
from alignlab.judges.sides import is_file
from alignlab.measuring.verification import as_json, verified
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder
from alignlab.runs.job import assemble, attach_reference, needs_of, prepare_data
from alignlab.train.loop import Progress, context_of
from alignlab.train.rewards import evaluate_held_out
from alignlab.train.shadow import evaluate_shadows
from alignlab.verbs import evaluate_control, evaluate_judge, evaluate_reranking, evaluate_rewards, evaluate_tasks
from alignlab.verbs.options import measurement_name


def run(request: Request) -> int:
    """Measure on ``data.eval_path`` (or ``eval_fraction``, else the rows of ``data.path``); JSON holds all figures."""
    which = _measurement(request)
    if which == "rm":
        return evaluate_rewards.run(request)
    if which == "judge" and request.target is not None and is_file(request.target):
        return evaluate_judge.run(request, None, None)
    if which is not None:
        return MEASUREMENTS[which].run(request, *trained(request))
    config, folder = trained(request)
    if config.objective is None:
        raise ConfigError("evaluate: objective is missing for a bare model; e.g. objective=sft")
    if config.data.path is None and not config.data.sources:
        raise ConfigError("evaluate: data is missing; e.g. data=held-out.jsonl")
    config = on_rows_given(config)
    data = prepare_data(config)
    dist.init(timeout=config.engine.timeout)
    job = assemble(config, data)
    attach_reference(job)
    assert job.held_plans is not None
    assert job.held_loader is not None
    objective = data.objective
    context = context_of(job.plans, job.plans.at(0), 0, config.optim, config.seed, Progress())
    job.engine.train(False)
    found: dict[str, float] = evaluate_held_out(job.engine, objective, job.held_plans, job.held_loader, context)
    found |= evaluate_shadows(job.engine, job.shadows, context)
    result: dict[str, Any] = {"model": config.model.name_or_path, "objective": objective.name, "metrics": found}
    if config.eval.generate and objective.head == "lm":
        measures, answers = verified(
            job.loaded.model, job.loaded.tokenizer, data.encoder, config.data, needs_of(objective), config.eval
        )
        found |= {f"eval_{name}": value for name, value in measures.items()}
        result["answers"] = as_json(answers)
    for name, value in sorted(found.items()):
        print(f"{name:<32} {value:.6g}")
    if folder is not None:
        folder.eval.mkdir(exist_ok=True)
        path = folder.eval / f"{result_name(config)}.json"
        write_atomic(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written  {path}")
    emit(request, result)
    return 0


class Measurement(NamedTuple):
    """What the verb measures when one of its own keys is there: how that is written, by what, and its keys."""

    form: str
    run: Callable[..., int]
    keys: tuple[str, ...]


def _keys(*kinds: tuple[type, str]) -> tuple[str, ...]:
    return tuple(f"{prefix}{field.name}" for kind, prefix in kinds for field in fields(kind))


MEASUREMENTS = {
    "rm": Measurement("rm=MODEL", evaluate_rewards.run, _keys((evaluate_rewards.Options, ""))),
    "control": Measurement("control=true", evaluate_control.run, _keys((evaluate_control.Options, ""))),
    "best_of": Measurement("best_of=N", evaluate_reranking.run, _keys((evaluate_reranking.Options, ""))),
    "judge": Measurement(
        "judge=MODEL", evaluate_judge.run, _keys((evaluate_judge.Options, ""), (evaluate_judge.JudgeConfig, "judge."))
    ),
    "tasks": Measurement(
        "tasks=NAMES", evaluate_tasks.run, _keys((evaluate_tasks.Options, ""), (evaluate_tasks.TasksConfig, "tasks."))
    ),
}
"""By the key that asks for it.  A key of several belongs to each of them."""


def _measurement(request: Request) -> str | None:
    """Which measurement the verb's own keys ask for; ConfigError where they ask for several, or belong to none."""
    asked = [key for key in MEASUREMENTS if key in request.own]
    if len(asked) > 1:
        more = "; reward models as measures are score=[NAME=MODEL]" if "rm" in asked else ""
        raise ConfigError(f"evaluate: {' and '.join(f'{key}=' for key in asked)} are several measurements{more}")
    problems = []
    for key in request.own:
        if not asked or key not in MEASUREMENTS[asked[0]].keys:
            forms = " or with ".join(one.form for one in MEASUREMENTS.values() if key in one.keys)
            also = f", not with {MEASUREMENTS[asked[0]].form}" if asked else ""
            problems.append(f"evaluate: {key}= goes with {forms}{also}")
    if problems:
        raise ConfigError("\n".join(problems))
    if asked == ["control"] and str(request.own["control"]).lower() == "false":
        raise ConfigError("evaluate: control=false asks for nothing; leave it out")
    return asked[0] if asked else None


def result_name(config: RootConfig) -> str:
    """``<rows>-<objective>-<8 hex>``: the same measurement has the same name, and no other one has."""
    said = {k: v for k, v in schema.flatten(config).items() if k.startswith("objective.")}
    return measurement_name(config, config.objective.name, said)


def trained(request: Request) -> tuple[RootConfig, RunFolder | None]:
    """The configuration with the model that the first argument stands for, in one process; and its run folder.

    A run's reference stays what it was in training: the policy the run began with.
    """
    config: RootConfig = request.config
    config = replace(config, engine=replace(config.engine, name="local"), peft=replace(config.peft, name="none"))
    if request.target is None:
        raise ConfigError(
            f"{request.verb} takes a run or a model as its first argument: alignlab {request.verb} runs/x"
        )
    for word in request.overrides:
        if word.partition("=")[0] in ("model", "model.name_or_path"):
            raise ConfigError(f"{request.verb}: {request.target} names the model already; leave out {word}")
    target = Path(os.path.expanduser(request.target))
    if request.file is None:
        return config, None
    folder = RunFolder(request.file.parent)
    folder.refuse_links()
    model = target if target.name == "model" else folder.model
    if not model.is_dir():
        raise ConfigError(f"{request.verb}: {folder} has no finished model; run the training to its end first")
    reference = config.reference.name_or_path or config.model.name_or_path
    return (
        replace(
            config,
            model=replace(config.model, name_or_path=str(model), revision=None, tokenizer_name_or_path=None),
            reference=replace(config.reference, name_or_path=reference),
        ),
        folder,
    )


def on_rows_given(config: RootConfig) -> RootConfig:
    """Without a held-out source the rows of ``data.path`` are what is evaluated.

    Nothing trains here, so nothing leaks: rows that are in both are measured as they are.
    """
    config = replace(config, data=replace(config.data, leaks="keep"))
    if holds_out(config.data):
        return config
    return replace(config, data=replace(config.data, eval_path=config.data.path, eval_split=config.data.split))
