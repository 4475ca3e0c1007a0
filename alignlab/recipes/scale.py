"""A recipe at one scale: what its stages are, what is measured, what is published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("train", "evaluate", "loop", "sample", "prepare", "run")
TRAINS = ("train", "loop", "prepare")
"""Kinds that take the file's ``settings`` and may have a ``start``."""
MODELS = ("train", "loop")
"""Kinds that make a model."""
READS = ("evaluate", "sample")
"""Kinds that work ``on`` the run of another stage."""


@dataclass(frozen=True)
class Stage:
    """One stage as the file has it; ``settings`` are the file's common ones and then its own."""

    name: str
    kind: str
    settings: dict[str, Any]
    file: Path
    start: str | None = None
    """stage whose model this one starts from"""
    on: str | None = None
    """stage whose run it reads"""
    needs: tuple[str, ...] = ()
    """every stage that must be done before, those above and those named in fields included"""
    function: str = ""
    """``file.py:name`` (kind ``run``)"""


@dataclass(frozen=True)
class Metric:
    """One figure: a number in the stages' results, less the one at ``minus``, or divided by the one at ``over``."""

    name: str
    say: str
    value: str
    minus: str | None
    published: str | None
    over: str | None = None
    chance: float | None = None
    """what a run without the effect would give, where that is known"""

    @property
    def without_effect(self) -> float | None:
        """``chance``; of a difference 0, of a ratio 1."""
        if self.chance is not None:
            return self.chance
        return 0.0 if self.minus else 1.0 if self.over else None

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.value, self.minus, self.over) if path]


@dataclass(frozen=True)
class Broken:
    """Settings that are wrong on purpose, and the metric that must notice."""

    name: str
    say: str
    stage: str
    set: dict[str, Any]
    metric: str


@dataclass(frozen=True)
class Scale:
    """A recipe at one scale."""

    recipe: str
    name: str
    file: Path
    title: str
    seconds: float | None
    memory_gib: float | None
    hardware: str
    data: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    """in an order in which each comes after those it needs"""
    metrics: dict[str, Metric] = field(default_factory=dict)
    broken: dict[str, Broken] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.file.parent

    def needed(self, names: Iterable[str]) -> list[str]:
        """These stages and all that they need, in order."""
        wanted, todo = set(), list(names)
        while todo:
            name = todo.pop()
            if name not in wanted:
                wanted.add(name)
                todo += self.stages[name].needs
        return [name for name in self.stages if name in wanted]

    def stages_of(self, metric: Metric) -> list[str]:
        """The stages that a metric's paths begin with."""
        return [path.partition(".")[0] for path in metric.paths]


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second's keys last: ``data.options.rows`` after ``data.options`` changes it, before it does nothing."""
    return {**{key: value for key, value in first.items() if key not in second}, **second}
