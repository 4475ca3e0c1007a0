"""What can be said of a composed configuration without a GPU, without training and without a connection.

Composition (the closed schema, values, rules between keys, plug-ins) comes before and has its own errors.  Here: keys
that nothing would read, packages that are missing, what an engine cannot do, and whether the rows and the model that
are on this machine fit the objective.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from alignlab import liveness
from alignlab.config import DataConfig, ModelConfig, RootConfig, SourceConfig
from alignlab.data import cache
from alignlab.data.index import Index
from alignlab.data.prepare import prepare
from alignlab.data.sources import Needs, sources_of
from alignlab.engine.base import check, resolve_name
from alignlab.errors import AlignlabError, ConfigError
from alignlab.models import fourbit
from alignlab.models.load import resolve_dtype
from alignlab.models.source import at_hand
from alignlab.models.tokens import check_same_tokens, load_tokenizer
from alignlab.registry import OBJECTIVES
from alignlab.request import Request
from alignlab.runs.job import make_encoder, make_objective, needs_of

ROWS = 64
"""So many rows of each source are looked at."""
SOME = 16
"""So many of them, over all sources, are given to the objective."""
ANY_LENGTH = "1000000"


@dataclass
class Findings:
    """``problems``: the training would end with exit code 2.  ``notes``: what could not be looked at here."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, error: AlignlabError) -> None:
        self.problems += str(error).splitlines()


def validate(request: Request) -> Findings:
    """Look at everything there is on this machine."""
    config: RootConfig = request.config
    found = Findings()
    try:
        liveness.gate(request)
    except ConfigError as error:
        found.add(error)
    found.problems += missing_packages(config)
    _engine(config, found)
    model = _model(config, found)
    _rows(config, model, found)
    return found


def missing_packages(config: RootConfig) -> Iterator[str]:
    """One line for each package that the settings need and that is not installed."""
    for logger in config.logger.names:
        if logger != "jsonl" and importlib.util.find_spec(logger) is None:
            yield f"logger={logger} needs the package {logger}: pip install 'alignlab[{logger}]'"
    for setting, wanted in (("peft=qlora", config.peft.name == "qlora"), ("optim=adamw_8bit", _is_8bit(config))):
        if wanted and not fourbit.installed():
            yield f"{setting} needs bitsandbytes: pip install 'alignlab[qlora]'"
    if config.model.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        yield "model.use_liger_kernel needs the package liger-kernel: pip install 'alignlab[liger]'"
    hub = [s.path for s in sources_of(config.data, held_out=False) if _on_hub(s) and not _fetched(s)]
    if hub and importlib.util.find_spec("datasets") is None:
        yield f"data: {hub[0]} is on the hub, which needs the package datasets: pip install 'alignlab[hub]'"


def _is_8bit(config: RootConfig) -> bool:
    return config.optim.name == "adamw_8bit"


class Placement(NamedTuple):
    """What a training would run on."""

    engine: str
    """resolved: never ``auto``"""
    ranks: int
    device: torch.device
    dtype: torch.dtype


def placement(config: RootConfig, *, gpu: bool = False) -> Placement:
    """Engine, ranks, kind of device and dtype; where not stated they are those of this machine, or of a ``gpu``.

    Raises ConfigError for what the engine refuses.
    """
    launch = config.launch
    own = max(1, torch.cuda.device_count())
    named = launch.gpus_per_node if launch.name in ("slurm", "sbatch") and launch.nproc == "auto" else None
    ranks = launch.nnodes * (int(launch.nproc) if launch.nproc != "auto" else named or own)
    if config.engine.name == "local" or launch.name == "inline":
        ranks = 1  # a launcher on many ranks is a rule of the configuration
    name = resolve_name(config.engine.name, ranks)
    device = torch.device("cuda" if gpu or torch.cuda.is_available() or named else "cpu")
    dtype = resolve_dtype(config.model.dtype, device)
    check(name, config.optim, config.engine, dtype, ranks)
    return Placement(name, ranks, device, dtype)


def _engine(config: RootConfig, found: Findings) -> None:
    try:
        placement(config)
    except ConfigError as error:
        found.add(error)


# ---------------------------------------------------------------------------------------------------------------
# The model and the rows
# ---------------------------------------------------------------------------------------------------------------


def _model(config: RootConfig, found: Findings) -> ModelConfig:
    """The model whose tokenizer renders the rows here: the configured one, or ``tiny`` where that is not at hand."""
    model = config.model
    try:
        absent = [name for name in (model.name_or_path, model.tokenizer_name_or_path) if name and _absent(model, name)]
        if absent:
            found.notes.append(f"model    {absent[0]} is not on this machine: not looked at")
            return ModelConfig("tiny")
        make_encoder(model, config.data)
        reference = config.reference.name_or_path
        if reference is not None and model.tokenizer_name_or_path is None and not _absent(model, reference):
            theirs = load_tokenizer(replace(model, name_or_path=reference, revision=None))
            check_same_tokens(load_tokenizer(model), theirs, reference)
        return model
    except AlignlabError as error:
        found.add(error)
        return ModelConfig("tiny")


def _absent(model: ModelConfig, name: str) -> bool:
    return name != "tiny" and at_hand(model, name) is None


def _rows(config: RootConfig, model: ModelConfig, found: Findings) -> None:
    """The first rows of every source, prepared as training would; each source by itself, so that each has its say."""
    data, needs = config.data, needs_of(make_objective(config))
    stand_in = model.name_or_path == "tiny" != config.model.name_or_path
    before = len(found.problems), len(found.notes)
    sides = [(source, False) for source in sources_of(data, held_out=False)]
    if data.eval_path is not None:
        sides += [(source, True) for source in sources_of(data, held_out=True)]
    for source, held_out in sides:
        if _on_hub(source) and not _fetched(source):
            found.notes.append(f"data     {source.path} (split {source.split}) is not on this machine: not looked at")
            continue
        try:
            _prepared(data, [source], needs, model, held_out, whole=stand_in)
        except AlignlabError as error:
            found.add(error)
    if (len(found.problems), len(found.notes)) == before:
        whole = _prepared(data, sources_of(data, held_out=False), needs, model, False, whole=stand_in)
        _steps(config, whole, found)


def _prepared(
    data: DataConfig, sources: list[SourceConfig], needs: Needs, model: ModelConfig, held_out: bool, *, whole: bool
) -> Index:
    """The first rows of the sources, or what preparing them raises; ``whole``: of any length, since the tokens are not
    the configured model's."""
    sums = any(source.path == "sums" for source in sources)
    few = replace(
        data, path=None, eval_path=None, eval_fraction=0.0, sources=[replace(source, weight=1.0) for source in sources],
        options=data.options | {"rows": ROWS, "eval_rows": ROWS} if sums else data.options,
        limit=min(data.limit or ROWS, ROWS), num_proc=1, max_length=ANY_LENGTH if whole else data.max_length,
    )  # fmt: skip
    _, encoder = make_encoder(model, few)
    return prepare(few, needs, encoder, held_out=held_out).index


def _steps(config: RootConfig, index: Index, found: Findings) -> None:
    """The objective on some of the rows, with scores that are made up: does it find in them what it needs?"""
    objective = make_objective(config)
    some = index.select(np.unique(np.linspace(0, len(index) - 1, SOME).astype(int)))
    try:
        liveness.take_steps(objective, config.optim, liveness.with_reference(some))
    except AlignlabError as error:
        found.add(error)
    except Exception as error:
        if OBJECTIVES.is_builtin(objective.name):
            raise
        found.problems.append(f"objective={objective.name} fails on these rows: {type(error).__name__}: {error}")


def _on_hub(source: SourceConfig) -> bool:
    return source.path != "sums" and not Path(source.path).expanduser().exists()


def _fetched(source: SourceConfig) -> bool:
    return cache.entry("datasets", cache.key({"path": source.path, "split": source.split})).exists()
