"""``alignlab evaluate RUN control=true``: the same prompts under a grid of conditions, and what each request moves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

from alignlab.config import RootConfig
from alignlab.configuration import schema
from alignlab.data.condition import Conditioner
from alignlab.data.sources import Needs
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError, DataError
from alignlab.measuring import control
from alignlab.measuring.conditions import levels_of, levels_text, scored_by, under
from alignlab.measuring.sampling import Sampler
from alignlab.measuring.scorers import TextScorer, named_scorers
from alignlab.measuring.verification import Answer, Prompt, as_json, prompts_of
from alignlab.request import Request, emit
from alignlab.rewards.intervals import Draws
from alignlab.runfolder import RunFolder
from alignlab.runs.job import make_objective, needs_of
from alignlab.types import Unit
from alignlab.verbs.options import measurement_name, own_options

PROMPTS = 50
RESAMPLES = 1000


@dataclass
class Options:
    """The verb's own settings for the control meter."""

    control: bool = False
    """Sweep the grid of conditions."""
    prompts: int = PROMPTS
    """So many held-out prompts are answered under each condition."""
    front: list[str] = field(default_factory=list)
    """Measures of the Pareto front; default: those that no condition controls."""
    resamples: int = RESAMPLES
    """Draws of the bootstrap over prompts; ``seed`` is the run's."""
    score: list[str] = field(default_factory=list)
    """More measures: ``NAME=SCORER`` (:mod:`alignlab.measuring.scorers`), e.g. ``[helpfulness=runs/rm]``."""


def run(request: Request, config: RootConfig, folder: RunFolder | None) -> int:
    """Print the tables; JSON and the run's ``eval/control-<rows>-<8 hex>.{json,png}`` hold all figures and texts."""
    options = own_options(request, Options)
    scorers = named_scorers(options.score, config)
    needs = needs_of(make_objective(config)) if config.objective is not None else Needs(Unit.SEQUENCE)
    if needs.stage is None:
        raise ConfigError(
            f"evaluate control=true: objective={config.objective and config.objective.name} knows no conditions; give "
            "a run of objective=cpsft or objective=cpo"
        )
    conditioner = Conditioner(config.data.condition, needs.stage)
    levels = levels_of(config, needs, "evaluate control=true")
    conditions: list[dict[str, float]] = [{}, *control.grid(levels)]
    prompts = list(prompts_of(config.data, replace(needs, stage=None), held_out=True, limit=options.prompts))
    if not prompts:
        raise DataError("evaluate control=true: the held-out rows have no prompt")
    print(f"grid     {levels_text(levels)}; {len(prompts)} prompts under each, and under none")
    asked = [under(conditioner, prompt, condition) for condition in conditions for prompt in prompts]
    found = list(Sampler(config, "evaluate control=true").answers(asked, temperature=0.0, num_samples=1))
    found = _scored(found, [prompt for _ in conditions for prompt in prompts], scorers)
    readings = _readings(found)
    draws, continuous = Draws(options.resamples, config.seed), [n for n, s in scorers.items() if not s.is_verifier]
    meter = control.meter(readings, draws, _known(options.front, readings), continuous)
    print("\n".join(control.table_text(meter)))
    judges = {name: scorer.identity for name, scorer in scorers.items()}
    result = {
        "model": config.model.name_or_path, "prompts": len(found) // len(conditions), "levels": levels,
        "scorers": judges,
        **control.as_json(meter),
    }  # fmt: skip
    if folder is not None:
        folder.eval.mkdir(exist_ok=True)
        said = {k: v for k, v in schema.flatten(config).items() if k.startswith("objective.")}
        name = f"control-{measurement_name(config, 'grid', said | {'prompts': options.prompts, 'score': judges})}"
        path = folder.eval / f"{name}.json"
        write_atomic(path, json.dumps({**result, "answers": as_json(found)}, indent=1, ensure_ascii=False) + "\n")
        write_atomic(path.with_suffix(".png"), control.plot(meter))
        print(f"written  {path} and {name}.png")
    emit(request, result)
    return 0


def _scored(found: list[Answer], plain: list[Prompt], scorers: dict[str, TextScorer]) -> list[Answer]:
    """``found`` with the scorers' measures; a scorer sees the prompt as it is without a condition."""
    found = scored_by(found, plain, scorers)
    # The grid stays full: a prompt counts under all conditions or under none.
    lost = {
        prompt.id
        for answer, prompt in zip(found, plain, strict=True)
        if not scorers.keys() <= answer.measures[0].keys()
    }
    if lost:
        print(f"unscored prompts left out: {len(lost)} (an answer to them is empty or too long for a scorer)")
    kept = [answer for answer, prompt in zip(found, plain, strict=True) if prompt.id not in lost]
    if not kept:
        raise DataError("score: every prompt has an answer that a scorer cannot take (empty or too long)")
    return kept


def _readings(found: list[Answer]) -> list[control.Reading]:
    if not found[0].measures[0]:
        raise ConfigError(
            "evaluate control=true: nothing measures the answers; name a verifier: eval.verifier=NAME (your own: "
            "plugins=[./mine.py] with @register_verifier), or a reward model: score=[NAME=runs/rm]"
        )
    return [control.Reading(a.prompt.id, a.prompt.requested, a.measures[0]) for a in found]


def _known(front: list[str], readings: list[control.Reading]) -> list[str]:
    unknown = sorted(set(front) - set(readings[0].measured))
    if unknown:
        raise ConfigError(f"evaluate: front={front}: not measured: {', '.join(unknown)}; there is "
                          f"{', '.join(sorted(readings[0].measured))}")  # fmt: skip
    return front
