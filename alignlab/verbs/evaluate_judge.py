"""``alignlab evaluate RUN judge=MODEL``: what a large language model says of a model's answers.

The judge is any OpenAI-compatible chat endpoint.  What is judged is a run's or a model's answers to the rows' prompts,
or a file of answers; against another one's, or the rows' own.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig
from alignlab.configuration import names
from alignlab.data.condition import Conditioner
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError, DataError
from alignlab.judges import report
from alignlab.judges.endpoint import Endpoint, EndpointConfig, Estimate, Reply
from alignlab.judges.panel import Panel, make_panel
from alignlab.judges.sides import ROWS, Side, common, distinct, from_file, from_model, from_rows, is_file, named
from alignlab.judges.templates import TEMPLATES
from alignlab.measuring.sampling import asked
from alignlab.measuring.verification import Prompt
from alignlab.registry import unknown_name
from alignlab.request import Request, emit
from alignlab.rewards.intervals import RESAMPLES, Draws
from alignlab.runfolder import RunFolder
from alignlab.runs.job import make_objective, needs_of
from alignlab.verbs.options import measurement_name, own_options


@dataclass
class Options:
    """The verb's own settings where answers are judged."""

    judge: str = ""
    """The judge's name at its endpoint."""
    against: list[str] = field(default_factory=list)
    """Whom the answers are compared with: runs, models, files of answers, or ``rows`` (the rows' own answers)."""
    prompts: int = 200
    """At most so many prompts; 0: all."""
    resamples: int = RESAMPLES
    """Draws of the bootstrap over prompts; ``seed`` is the run's."""


@dataclass
class JudgeConfig(EndpointConfig):
    """How the judge is asked, and what; set as ``judge.<name>``."""

    template: str | None = None
    """pairwise (the default with ``against``) | helpfulness (without) | honesty | harmlessness | ranking"""
    condition: dict[str, float] = field(default_factory=dict)
    """A CPSFT or CPO run answers under this condition, e.g. ``{helpfulness: 5}``; the judge does not see it."""


def run(request: Request, config: RootConfig | None, folder: RunFolder | None) -> int:
    """Say what it will cost, ask, print the figures; JSON and the run's ``eval/<rows>-judge-<8 hex>.json`` hold all.

    ``config`` and ``folder`` are those of the model that is judged; None where the first argument is a file.
    """
    options, judge = own_options(request, Options), own_options(request, JudgeConfig, "judge.")
    template = TEMPLATES[_template(options, judge)]
    _check(options, judge, template.kind)
    endpoint = Endpoint(options.judge, judge)
    sides = _sides(request, config, options, judge)
    prompts, unmatched = common(sides, options.prompts or None)
    panel = make_panel(template, sides, prompts, request.config.seed)
    estimate = endpoint.estimate(panel.requests)
    print(f"judge    {options.judge} at {endpoint.url}   template {template.name}")
    print(
        f"answers  {len(prompts):,} prompts, {' against '.join(side.name for side in sides)}{_lost(sides, unmatched)}"
    )
    print("\n".join(report.estimate_lines(estimate, judge.concurrency)), flush=True)
    result: dict[str, Any] = {
        "judge": options.judge, "base_url": endpoint.url, "template": template.name, "prompts": len(prompts),
        "sides": [side.name for side in sides], "unmatched": unmatched, "estimate": asdict(estimate),
        "left_out": {side.name: dict(side.left_out) for side in sides if side.left_out},
    }  # fmt: skip
    if judge.dry_run:
        emit(request, result)
        return 0
    replies = endpoint.ask(panel.requests, _say)
    result |= _figures(panel, replies, Draws(options.resamples, request.config.seed))
    result["asked"] = _spent(replies, estimate, judge)
    print("\n".join(report.lines(template.kind, result)))
    if folder is not None:
        path = _written(request.config, options, judge, folder, result, panel, replies)
        print(f"written  {path}")
    emit(request, result)
    return 0


def _template(options: Options, judge: JudgeConfig) -> str:
    name = judge.template or ("pairwise" if options.against else "helpfulness")
    if name not in TEMPLATES:
        raise ConfigError(f"judge.template: {unknown_name('template', name, list(TEMPLATES))}")
    return name


def _check(options: Options, judge: JudgeConfig, kind: str) -> None:
    problems = []
    if not options.judge:
        problems.append("judge: name the model that judges, e.g. judge=gpt-4o")
    if kind == "pair" and len(options.against) != 1:
        problems.append(
            f"judge.template=pairwise compares two: give one against=RUN|FILE|rows, not {len(options.against)}"
        )
    if kind == "ranking" and not options.against:
        problems.append("judge.template=ranking ranks several: against=[RUN, FILE, rows]")
    for key, value, least in (
        ("prompts", options.prompts, 0), ("resamples", options.resamples, 100),
        ("judge.concurrency", judge.concurrency, 1), ("judge.max_retries", judge.max_retries, 0),
        ("judge.max_tokens", judge.max_tokens, 1),
        ("judge.price_in", judge.price_in, 0), ("judge.price_out", judge.price_out, 0),
        ("judge.temperature", judge.temperature, 0),
    ):  # fmt: skip
        if value is not None and value < least:
            problems.append(f"{key}: {value} (expected {least} or more)")
    if judge.timeout <= 0:
        problems.append(f"judge.timeout: {judge.timeout} (expected more than 0)")
    if (judge.price_in is None) is not (judge.price_out is None):
        problems.append("judge.price_in and judge.price_out: a cost needs both")
    if problems:
        raise ConfigError("\n".join(f"evaluate: {problem}" for problem in problems))


# ---------------------------------------------------------------------------------------------------------------
# Whose answers
# ---------------------------------------------------------------------------------------------------------------


def _sides(request: Request, config: RootConfig | None, options: Options, judge: JudgeConfig) -> list[Side]:
    """The judged one first, then those it is compared with; generated answers are to the same prompts."""
    own: RootConfig = request.config
    own = replace(own, eval=replace(own.eval, generate=options.prompts))
    if config is None:
        if judge.condition:
            raise ConfigError("judge.condition: the answers in a file are there already")
        assert request.target is not None
        first = from_file(request.target, own.data)
    else:
        config = replace(config, eval=own.eval)
        prompts = asked(config, "evaluate judge=", conditioned=False)
        first = from_model(config, _name(request.target or ""), prompts, _under(config, judge.condition, prompts))
    return distinct([first, *(_other(own, name, first.prompts) for name in options.against)])


def _other(config: RootConfig, name: str, prompts: list[Prompt]) -> Side:
    if name == ROWS:
        if config.data.path is None and not config.data.sources:
            raise ConfigError("against=rows: data is missing; e.g. data=rows.jsonl")
        return from_rows(config.data)
    if is_file(name):
        return from_file(name, config.data)
    return from_model(named(config, name), _name(name), prompts)


def _under(config: RootConfig, condition: dict[str, float], prompts: list[Prompt]) -> list[Prompt]:
    """The prompts as a conditioned model is asked."""
    if not condition:
        return prompts
    stage = needs_of(make_objective(config)).stage if config.objective is not None else None
    if stage is None:
        raise ConfigError(
            "judge.condition: the run knows no conditions; give a run of objective=cpsft or objective=cpo"
        )
    conditioner = Conditioner(config.data.condition, stage)
    return [replace(prompt, messages=conditioner.prompt(condition, prompt.messages)) for prompt in prompts]


def _name(target: str) -> str:
    """What a model is called in tables: a run by its name."""
    path = Path(os.path.expanduser(target))
    return path.parent.name if path.name == "model" and path.parent.name else path.name or target


# ---------------------------------------------------------------------------------------------------------------
# What is said and kept
# ---------------------------------------------------------------------------------------------------------------


def _lost(sides: list[Side], unmatched: int) -> str:
    lost = [f"{side.name}: {reason} {count}" for side in sides for reason, count in sorted(side.left_out.items())]
    lost += [f"answered by some only: {unmatched:,}"] if unmatched else []
    return f" (left out: {'; '.join(lost)})" if lost else ""


def _say(done: int, of: int) -> None:
    if done == of or done % max(1, of // 5) == 0:
        print(f"  {done:,}/{of:,} replies", flush=True)


def _figures(panel: Panel, replies: list[Reply], draws: Draws) -> dict[str, Any]:
    """The figures; DataError where not a single reply was a verdict."""
    texts = [reply.text for reply in replies]
    cut = sum(reply.finish == "length" for reply in replies)
    found = panel.figures(texts, draws)
    if texts and all(panel.template.read(text, len(panel.sides)) is None for text in texts):
        shown = " ".join(texts[0].split())[-120:] or "(nothing)"
        raise DataError(
            f"judge: none of {len(texts)} replies holds a verdict ({cut} were cut at judge.max_tokens); the first "
            f"ends: {shown}"
        )
    return {"figures": found, "cut": cut}


def _spent(replies: list[Reply], estimate: Estimate, judge: JudgeConfig) -> dict[str, Any]:
    tokens_in, tokens_out = (sum(getattr(r, name) for r in replies) for name in ("tokens_in", "tokens_out"))
    cost = None
    if judge.price_in is not None and judge.price_out is not None:
        cost = (tokens_in * judge.price_in + tokens_out * judge.price_out) / 1e6
    return {"calls": estimate.asked, "tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost}


def _written(
    config: RootConfig, options: Options, judge: JudgeConfig, folder: RunFolder, result: dict[str, Any], panel: Panel,
    replies: list[Reply],
) -> Path:  # fmt: skip
    """The file of all figures and verdicts in the run's folder."""
    quick = ("concurrency", "max_retries", "timeout", "price_in", "price_out", "dry_run", "api_key_env")
    said = {f"judge.{f.name}": getattr(judge, f.name) for f in fields(judge) if f.name not in quick}
    said |= {"judge": options.judge, "against": [names.identify(name) for name in options.against]}
    said |= {"prompts": options.prompts, "resamples": options.resamples, "seed": config.seed}
    folder.eval.mkdir(exist_ok=True)
    path = folder.eval / f"{measurement_name(config, 'judge', said)}.json"
    texts = [reply.text for reply in replies]
    kept = {**result, "verdicts": panel.verdicts(texts)}
    write_atomic(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return path
