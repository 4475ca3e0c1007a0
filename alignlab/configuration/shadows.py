"""Which shadow objectives a run has (``eval.shadow``), and the rows of their probe set (``eval.probe_path``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from alignlab.config import DataConfig, EvalConfig, RootConfig
from alignlab.configuration import schema
from alignlab.data.prepare import Prepared, prepare
from alignlab.data.sources import Needs
from alignlab.data.template import Encoder
from alignlab.errors import ConfigError, DataError
from alignlab.objectives.pair_losses import LOSS_TYPES
from alignlab.registry import OBJECTIVES


@dataclass(frozen=True)
class Probe:
    """The probe set as some shadow objectives eat it."""

    objectives: dict[str, Any]
    """by name; all with equal needs"""
    rows: Prepared

    @property
    def objective(self) -> Any:
        """One of them: what they are alike in."""
        return next(iter(self.objectives.values()))

    @property
    def needs_reference(self) -> bool:
        return any(objective.needs_reference for objective in self.objectives.values())


def shadow_objectives(config: EvalConfig) -> dict[str, Any]:
    """The objectives that ``eval.shadow`` names, configured, by name; ConfigError in one line where one cannot be.

    A name is an objective of the registry, else a loss type of ``dpo``.
    """
    unused = sorted(set(config.shadow_options) - set(config.shadow))
    if unused:
        raise ConfigError(f"eval.shadow_options.{unused[0]}: eval.shadow does not name '{unused[0]}'")
    return {name: _objective(name, config.shadow_options.get(name) or {}) for name in config.shadow}


def _objective(name: str, options: Any) -> Any:
    if not isinstance(options, dict):
        raise ConfigError(f"eval.shadow_options.{name}: {options} (expected a mapping, {{beta: 0.5}})")
    chosen, given = (name, options) if name in OBJECTIVES.names() else ("dpo", {"loss_type": name, **options})
    if chosen != name and name not in LOSS_TYPES:
        known = ", ".join(dict.fromkeys([*OBJECTIVES.names(), *LOSS_TYPES]))
        raise ConfigError(f"eval.shadow: '{name}' is no objective and no loss type of dpo; known: {known}")
    kind = OBJECTIVES.get(chosen)
    try:
        objective = kind(schema.coerce(given, schema.objective_config(chosen)))
    except (ValueError, ConfigError) as error:
        said = str(error).removeprefix("objective.")
        raise ConfigError(f"eval.shadow: {name}: {said}; its options: eval.shadow_options.{name}") from None
    if objective.head != "lm" or getattr(objective, "stage", None):
        why = "scores with a scalar head" if objective.head != "lm" else "needs conditioned rows"
        raise ConfigError(f"eval.shadow: '{name}' {why}, and shadows are losses of a language model on plain pairs")
    return objective


def shadow_problems(config: RootConfig) -> Iterator[str]:
    """What is wrong with the shadow keys, one line each."""
    told = config.eval
    if not told.shadow:
        for key in ("probe_path", "shadow_options"):
            if getattr(told, key):
                yield f"eval.{key}: nothing reads it without eval.shadow=[...]"
        return
    if len(set(told.shadow)) < len(told.shadow):
        yield f"eval.shadow: [{', '.join(told.shadow)}] names one twice"
    try:
        shadow_objectives(told)
    except ConfigError as error:
        yield str(error)
    if told.probe_path is None and config.data.eval_path is None and not config.data.eval_fraction:
        yield "eval.shadow: no rows to probe: give pairs in eval.probe_path, or held-out rows (data.eval_path)"
    if config.objective is not None and OBJECTIVES.get(config.objective.name).head != "lm":
        yield f"eval.shadow: objective={config.objective.name} trains a scalar head, not a language model"


def probes(config: RootConfig, encoder: Encoder, needs_of: Any) -> list[Probe]:
    """The probe set, prepared once for each kind of rows that the shadow objectives need.

    ``needs_of(objective)`` is :func:`alignlab.runs.job.needs_of`.  ``eval.limit`` holds for these rows too.
    """
    alike: dict[tuple[Needs, bool], dict[str, Any]] = {}
    for name, objective in shadow_objectives(config.eval).items():
        alike.setdefault((needs_of(objective), objective.mixes_inputs), {})[name] = objective
    found = []
    for (needs, _), objectives in alike.items():
        try:
            rows = prepare(_probe_data(config), needs, encoder, held_out=True, seed=config.seed)
        except DataError as error:
            raise DataError(f"eval.shadow=[{', '.join(objectives)}]: {error}; name pairs in eval.probe_path") from None
        if config.eval.limit is not None:
            rows = replace(rows, index=rows.index.select(range(min(config.eval.limit, len(rows.index)))))
        found.append(Probe(objectives, rows))
    return found


def _probe_data(config: RootConfig) -> DataConfig:
    """The rows to probe: those of ``eval.probe_path``, recognised from their columns, else the held-out rows."""
    if config.eval.probe_path is None:
        return config.data
    return replace(
        config.data, eval_path=config.eval.probe_path, eval_fraction=0.0, format="auto", columns={}, group_by=None,
        rating=[],
    )  # fmt: skip
