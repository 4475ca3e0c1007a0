"""Whether a key that the user set does anything: asked before training, answered by running.

The configured objective takes a step on two random prompt trees (scores made up, no model), and the optimizer and the
learning rate are made and used once, on a configuration that notes what is read.  A key of ``objective`` or ``optim``
that the user set and that nothing read stops the run: it was meant to change the training.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from alignlab.config import OptimConfig, RootConfig
from alignlab.configuration import checks, names, schema, yamlio
from alignlab.configuration.watch import watched
from alignlab.errors import ConfigError
from alignlab.registry import OBJECTIVES
from alignlab.request import Request

SECTIONS = ("objective", "optim")
SELECTORS = ("objective.name", "optim.name")
"""Read by whoever builds the component."""
READ_BY_OTHERS = "ALIGNLAB_SWEEP_READS"
"""Environment of a sweep's points: the keys that some point reads, which therefore stop no point."""

_STEPS = 10**6
_answers: dict[str, frozenset[str] | None] = {}


@dataclass(frozen=True)
class Idle:
    """Keys that the user set and training would not read, with the line that says so; and the keys it would read."""

    lines: dict[str, str]
    reads: frozenset[str]


def gate(request: Request) -> None:
    """Stop with one line for each idle key of ``objective`` and ``optim``; note the keys that training will read.

    Only warned of: what another point of the same sweep reads, and what a run's own file holds when nothing of these
    sections is typed over it (it was checked when it was frozen).
    """
    answer = idle(request)
    request.reads |= answer.reads
    found = answer.lines
    elsewhere = set(os.environ.get(READ_BY_OTHERS, "").split(","))
    fatal = [line for key, line in found.items() if key not in elsewhere and not _of_a_run(request)]
    if fatal:
        raise ConfigError("\n".join(fatal))
    for key, line in found.items():
        print(f"warning  {line}{' (other points read it)' if key in elsewhere else ''}", file=sys.stderr)


def _of_a_run(request: Request) -> bool:
    typed = {token.partition("=")[0].partition(".")[0] for token in (*request.overrides, *request.settings)}
    return request.file is not None and request.file.name == "run.yaml" and not typed & set(SECTIONS)


def idle(request: Request) -> Idle:
    """What the user set in ``objective`` and ``optim`` of a composed request and training would not read."""
    config: RootConfig = request.config
    reads = read_in_training(config.objective, config.optim)
    if reads is None:
        return Idle({}, frozenset())
    lines = {
        key: _line(key, request.provenance[key], config)
        for key in sorted(request.stated)
        if key.partition(".")[0] in SECTIONS and key not in reads
    }
    return Idle(lines, reads)


def check_sweep(points: Mapping[str, Request]) -> frozenset[str]:
    """The keys that some point reads; :class:`ConfigError` for idle keys that no point reads."""
    found = {name: idle(request) for name, request in points.items()}
    reads = frozenset().union(*(one.reads for one in found.values()))
    fatal = {
        key: f"{line} (no point of the sweep reads it)"
        for one in found.values()
        for key, line in one.lines.items()
        if key not in reads
    }
    if fatal:
        raise ConfigError("\n".join(fatal.values()))
    return reads


# ---------------------------------------------------------------------------------------------------------------
# What training reads
# ---------------------------------------------------------------------------------------------------------------


def read_in_training(objective: Any, optim: OptimConfig) -> frozenset[str] | None:
    """The keys of both sections that training reads; None where the objective cannot run on random rows.

    The answer is kept: points of a sweep ask again and again.
    """
    key = names.digest({**schema.flatten(objective, "objective."), **schema.flatten(optim, "optim.")})
    if key not in _answers:
        reads = set(SELECTORS)
        _use_optimizer(watched(optim, reads, "optim."))
        try:
            _use_objective(watched(objective, reads, "objective."), optim)
        except Exception:
            if OBJECTIVES.is_builtin(objective.name):
                raise
            _answers[key] = None  # an objective from outside may need numbers that only its own rows have
        else:
            _answers[key] = frozenset(reads)
    return _answers[key]


def _use_optimizer(optim: OptimConfig) -> None:
    """Everything the engines and the loop do with ``optim``."""
    import torch

    from alignlab.engine.optim import clip_, optimizer_options, parameter_groups
    from alignlab.train.schedule import learning_rate

    parameter_groups(torch.nn.Linear(1, 1), optim.weight_decay)
    optimizer_options(optim)
    clip_([torch.ones(1)], optim.max_grad_norm)
    total = _STEPS + (optim.warmup_steps or 0)
    for step in (0, 1, total - 1):
        learning_rate(optim, step, total)


def _use_objective(section: Any, optim: OptimConfig) -> None:
    take_steps(OBJECTIVES.get(section.name)(section), optim, _toy_rows())


def take_steps(objective: Any, optim: OptimConfig, index: Any) -> None:
    """A step of the warm-up, the last step, and an evaluation, all rows of ``index`` in each; scores are made up.

    ``index`` must hold reference numbers.  Raises what the objective raises.
    """
    import torch

    from alignlab.data.loader import Loader
    from alignlab.metrics import Meter
    from alignlab.train.schedule import warmup_steps
    from alignlab.train.single import plans_of, run_step
    from alignlab.types import StepContext

    plan = plans_of(index, objective).at(0)
    loader = Loader(index, "rows", torch.device("cpu"), torch.float64, 0, mixes_inputs=objective.mixes_inputs)
    if objective.needs_reference and objective.mismatched:
        pairs = map(tuple, plans_of(index, objective).mismatched_pairs(0).tolist())
        loader.mismatched_values = {"reference": dict.fromkeys(pairs, -8.0)}
    context = StepContext(1, _STEPS, warmup_steps(optim, _STEPS), 0, plan.totals)
    for changes in ({}, {"step": _STEPS - 1}, {"training": False}):
        run_step(made_up, objective, loader, plan, replace(context, **changes), Meter())
    if hasattr(objective, "end_of_step"):
        from alignlab.train.single import ScoreEngine
        from alignlab.train.step import with_statistics

        objective.end_of_step(with_statistics(ScoreEngine(made_up), objective, loader, plan, context))


def made_up(batch: Any, ask: Any) -> Any:
    """Scores of no model: as many as were asked for, the same every time."""
    import torch

    from alignlab.types import Scores

    generator = torch.Generator().manual_seed(0)
    count = len(batch.last) if ask.want == "reward" else len(batch.scored)
    values = torch.rand(count, generator=generator, dtype=torch.float64)
    if ask.want == "reward":
        return Scores(rewards=(values - 0.5).requires_grad_())
    if ask.want == "logps":
        return Scores(logps=(-0.1 - 2 * values).requires_grad_())
    return Scores(tokens=(values * 30).long())


@cache
def _toy_rows() -> Any:
    """The index of two random prompt trees."""
    import numpy as np

    from alignlab.data.random_trees import random_sample, write_index

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="alignlab-") as folder:  # what is mapped outlives its name
        index = write_index(Path(folder) / "index", [random_sample(rng, number) for number in range(2)])
    return with_reference(index)


def with_reference(index: Any) -> Any:
    """``index`` with a made-up reference log-probability for every sequence."""
    import numpy as np

    index.attach("reference", np.full(index.num_sequences, -8.0, dtype=np.float32))
    return index


# ---------------------------------------------------------------------------------------------------------------
# What to say
# ---------------------------------------------------------------------------------------------------------------


def _line(key: str, source: str, config: RootConfig) -> str:
    who = "set on the command line" if source == "command line" else f"set in {source}"
    for other, now, instead in _remedies(key, config):
        return f"{key}: {who}, but nothing reads it with {now}; drop it or take {other}={instead}"
    return f"{key}: {who}, but nothing reads it with these settings; drop it"


def _remedies(key: str, config: RootConfig) -> Iterator[tuple[str, str, str]]:
    """Other keys of the section, one at a time, whose change makes training read ``key``: (what to type, now, then)."""
    group, _, leaf = key.partition(".")
    section = getattr(config, group)
    for name, value in _alternatives(section, group, leaf):
        now = getattr(section, name)
        if name == leaf or schema.plain(now) == schema.plain(value):
            continue
        with suppress(Exception):
            changed = replace(section, **{name: value})
            sections = {"objective": config.objective, "optim": config.optim, group: changed}
            reads = read_in_training(sections["objective"], sections["optim"])
            if reads is not None and key in reads:
                typed = group if name == "name" else f"{group}.{name}"
                shown = group if name == "name" else name
                yield typed, f"{shown}={_text(now)}", _text(getattr(changed, name))


def _alternatives(section: Any, group: str, leaf: str) -> Iterator[tuple[str, Any]]:
    """(field, value): what the knob's own test needs beside it, every choice there is, every default."""
    for field in fields(section):
        if field.name == leaf and "live" in field.metadata:
            yield from field.metadata["live"][0].items()
    for field in fields(section):
        for choice in checks.CHOICES.get(f"{group}.{field.name}", ()):
            yield field.name, choice
    for key in schema.schema(section.name if group == "objective" else None).values():
        if key.name.startswith(f"{group}.") and not is_dataclass(key.default) and key.default != schema.REQUIRED:
            yield key.name.partition(".")[2], key.default


def _text(value: Any) -> str:
    shown = schema.plain(value)
    if isinstance(shown, list) and len(shown) == 1:
        shown = shown[0]
    return yamlio.scalar(shown)
