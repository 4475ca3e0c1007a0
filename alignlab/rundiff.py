"""What two run folders differ in: settings, rows, model, versions, and the step at which their numbers part.

Read from what a run leaves behind (``run.yaml``, ``keys.json``, ``status.json``, ``env.json``, ``data/manifest.json``,
``metrics.jsonl``, the ledger and the newest checkpoint's manifest); no plug-in is loaded and nothing is computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignlab.configuration import keys, names, schema
from alignlab.configuration.frozen import flat_file
from alignlab.data.ledger_query import Ledger, Parting, parting
from alignlab.engine import checkpoint
from alignlab.equivalence.compare import FLOOR, ONE, relative
from alignlab.errors import ConfigError
from alignlab.measuring.report import Series, read_series
from alignlab.registry import OBJECTIVES
from alignlab.runfolder import RunFolder
from alignlab.train.margins import read_margins

TOLERANCE = 1e-4
"""Relative difference of two figures that still counts as none: what the trainer promises of fp32 curves."""
SPEED = frozenset({
    "time", "tokens_per_second", "data_wait", "peak_memory_gib", "tflops", "mfu", "filler_share", "rank_imbalance",
})  # fmt: skip
"""Figures of a record that say how fast, not what."""
OF_THE_STEP = ("eval_", "shadow/", "grad_norm", "learning_rate", "num_tokens", "epoch", "skipped_steps")
"""Beginnings of figures that are no mean over a logging interval."""
RELATIVE = ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "eval_loss")
"""Figures compared relative to themselves; others (margins, shares) relative to 1 where they are smaller."""

NAMES = ("run.name", "output_dir")
"""Keys that say which of the two a run is."""

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Point:
    """Two figures of one step that are further apart than the tolerance."""

    step: int
    name: str
    values: tuple[float, float]
    relative: float


@dataclass(frozen=True)
class PairPoint:
    """The first pair whose margin parts, and the sample it belongs to."""

    step: int
    sample: str
    margins: tuple[float, float]


@dataclass
class RunDiff:
    """The differences by section; values are (of the first run, of the second), None where one has none."""

    numbers: dict[str, Pair] = field(default_factory=dict)
    """keys that can change a number; local files by their contents"""
    speed: dict[str, Pair] = field(default_factory=dict)
    """keys that cannot"""
    set_by: dict[str, Pair] = field(default_factory=dict)
    """who set each differing key"""
    model: dict[str, Pair] = field(default_factory=dict)
    data: dict[str, Pair] = field(default_factory=dict)
    """counts of the account of the rows, templates, the hash of the index"""
    versions: dict[str, Pair] = field(default_factory=dict)
    steps: Pair = (0, 0)
    """last step done"""
    stream: Parting | None = None
    """where the samples part"""
    unread: list[str] = field(default_factory=list)
    """what could not be compared, and why"""
    metrics: list[Point] = field(default_factory=list)
    """the first step at which each figure parts, earliest first"""
    compared: int = 0
    """figures that both runs have at the same step"""
    pair: PairPoint | None = None

    @property
    def same(self) -> bool:
        """Whether the runs stand for the same numbers: speed keys, versions and who set a key do not count."""
        parted = self.numbers or self.model or self.data or self.stream or self.metrics or self.pair
        return not parted and self.steps[0] == self.steps[1]


class Run:
    """One run folder as it is compared; ConfigError where there is none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = RunFolder(Path(name).expanduser())
        if not self.folder.path.is_dir():
            raise ConfigError(f"diff: no such run: {name}")
        if not self.folder.exists:
            raise ConfigError(f"diff: {name} is no run: it holds no run.yaml")

    @cached_property
    def config(self) -> dict[str, Any]:
        """Every key as it was frozen, local files by their contents where the launcher has noted them.

        A key that the version of the run did not have yet was at its default.
        """
        frozen = flat_file(self.folder.run_yaml)
        name = frozen.get("objective.name")
        known = schema.schema(name if name is not None and OBJECTIVES.is_builtin(name) else None)
        defaults = {key: schema.plain(one.default) for key, one in known.items() if one.default != schema.REQUIRED}
        return _flat({**defaults, **frozen, **(self.folder.status().get("contents") or {})})

    def set_by(self, key: str) -> str | None:
        """Who set a key, or the mapping that it stands in; None where the run does not say."""
        found = keys.recorded(self.folder.run_yaml)
        while key not in found and "." in key:
            key = key.rpartition(".")[0]
        return str(found[key]["set_by"]) if key in found else None

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, machine, engine and ranks."""
        found = _flat(_json(self.folder.env_json))
        if self.saved is not None:
            found |= {"engine": self.saved.meta.get("engine"), "ranks": self.saved.world_size}
        return {
            key: value for key, value in found.items() if not key.startswith(("job.", "environment.ALIGNLAB_CACHE"))
        }

    @cached_property
    def saved(self) -> checkpoint.Checkpoint | None:
        """The newest checkpoint by its manifest; None where the run has saved none."""
        return next(map(checkpoint.read, checkpoint.paths(self.folder.checkpoints)), None)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Hashes in the newest checkpoint: ``index`` of the rows as tokens, ``base`` of the reference's weights."""
        found = (self.saved.meta.get("fields") or {}) if self.saved is not None else {}
        return {name: found[name] for name in ("index", "base") if found.get(name) is not None}

    @cached_property
    def data(self) -> dict[str, Any]:
        index = {"train.index": self.fields["index"]} if "index" in self.fields else {}
        return {**_flat(_json(self.folder.data / "manifest.json")), **index}

    @cached_property
    def ledger(self) -> Ledger | None:
        return Ledger(self.folder.ledger) if self.folder.ledger.is_dir() else None

    @cached_property
    def series(self) -> Series:
        return read_series(self.folder.path) if self.folder.metrics.is_file() else {}


def difference(one: Run, other: Run, tolerance: float = TOLERANCE) -> RunDiff:
    """Everything that two runs differ in."""
    found = RunDiff()
    for key, values in schema.differing(one.config, other.config).items():
        if key in NAMES:
            continue
        (found.speed if names.is_speed(key) else found.numbers)[key] = values
        found.set_by[key] = (one.set_by(key), other.set_by(key))
    found.data = schema.differing(one.data, other.data)
    found.versions = schema.differing(one.environment, other.environment)
    base = (one.fields.get("base"), other.fields.get("base"))
    found.model = {"base weights": base} if None not in base and base[0] != base[1] else {}
    found.steps = (one.folder.status().get("step", 0), other.folder.status().get("step", 0))
    _streams(one, other, found)
    _metrics(one, other, found, tolerance)
    _pairs(one, other, found, tolerance)
    return found


def _streams(one: Run, other: Run, found: RunDiff) -> None:
    if one.ledger is None or other.ledger is None:
        found.unread.append("samples: a run without a ledger has not begun to train")
        return
    found.stream = parting(one.ledger, other.ledger)


def _metrics(one: Run, other: Run, found: RunDiff, tolerance: float) -> None:
    means = "train.logging_steps" not in found.speed
    if not means:
        found.unread.append("means over a logging interval: train.logging_steps differs")
    for name in sorted({*one.series, *other.series} - SPEED):
        if not means and not name.startswith(OF_THE_STEP):
            continue
        mine, its = (dict(run.series.get(name, ())) for run in (one, other))
        for step in sorted(mine.keys() & its.keys()):
            found.compared += 1
            apart = relative(mine[step], its[step], FLOOR if name.startswith(RELATIVE) else ONE)
            if apart > tolerance:
                found.metrics.append(Point(step, name, (mine[step], its[step]), apart))
                break
    order = {name: place for place, name in enumerate(RELATIVE)}
    found.metrics.sort(key=lambda point: (point.step, order.get(point.name, len(order)), point.name))


def _pairs(one: Run, other: Run, found: RunDiff, tolerance: float) -> None:
    """The first pair, in the order of steps and samples, whose margin parts while both runs see the same samples."""
    if one.ledger is None or other.ledger is None:
        return
    tables = [read_margins(run.folder.ledger) for run in (one, other)]
    end = found.stream.step if found.stream else np.iinfo(np.int64).max
    keyed = [
        np.stack([table[name].to_numpy() for name in ("step", "sample", "chosen", "rejected")]) for table in tables
    ]
    margins = [table["margin"].to_numpy().astype(np.float64) for table in tables]
    kept = [key[0] < end for key in keyed]
    first, second = (key[:, keep] for key, keep in zip(keyed, kept, strict=True))
    length = min(first.shape[1], second.shape[1])
    if not length or not np.array_equal(first[:, :length], second[:, :length]):
        return
    a, b = (margin[keep][:length] for margin, keep in zip(margins, kept, strict=True))
    apart = np.flatnonzero(~(np.abs(a - b) <= tolerance * np.maximum(np.maximum(np.abs(a), np.abs(b)), ONE)))
    if len(apart):
        place = int(apart[0])
        sample = one.ledger.kept["id"][int(first[1, place])].as_py()
        found.pair = PairPoint(int(first[0, place]), sample, (float(a[place]), float(b[place])))


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of the run's own; empty where the run did not come that far; ConfigError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    return found if isinstance(found, dict) else {}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings."""
    return dict(_entries(value, prefix))


def _entries(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _entries(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
