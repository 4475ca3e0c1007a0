"""A metric's number in the results of a recipe's stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from alignlab.errors import ConfigError
from alignlab.recipes.scale import Metric, Scale


def measured(scale: Scale, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Every metric whose stages are among ``results``; :class:`ConfigError` for a path that leads to no number.

    NaN for a figure that this run does not define: a stage says null where it could not be computed (the correlation
    with a measure that never varies), or the divisor is 0.  It lies in no band, and takes no other figure with it.
    """
    return {
        name: _value(scale, metric, results)
        for name, metric in scale.metrics.items()
        if all(stage in results for stage in scale.stages_of(metric))
    }


def _value(scale: Scale, metric: Metric, results: Mapping[str, Mapping[str, Any]]) -> float:
    value = _at(scale, metric, "value", metric.value, results)
    if metric.over:
        divisor = _at(scale, metric, "over", metric.over, results)
        return value / divisor if divisor else math.nan
    return value - _at(scale, metric, "minus", metric.minus, results) if metric.minus else value


def _at(scale: Scale, metric: Metric, role: str, path: str, results: Mapping[str, Mapping[str, Any]]) -> float:
    where = f"{scale.file}: metrics.{metric.name}.{role}: '{path}'"
    stage, _, rest = path.partition(".")
    try:
        found = follow(results[stage], rest)
    except LookupError:
        known = ", ".join(sorted(_paths(results[stage]))[:40])
        raise ConfigError(f"{where}: stage {stage} has no such figure; it has {known}") from None
    if found is None:
        return math.nan
    if isinstance(found, (dict, list)):
        raise ConfigError(f"{where}: is no number but holds {', '.join(sorted(_paths(found))[:40])}")
    try:
        number = float(found)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: is no number: {found!r}") from None
    return number if math.isfinite(number) else math.nan


def follow(value: Any, path: str) -> Any:
    """What stands at a dotted path: None where a null does, or one on the way; :class:`LookupError` where nothing does.

    A key may hold dots itself, a list takes a number (-1: the last).
    """
    if not path or value is None:
        return value
    parts = path.split(".")
    if isinstance(value, list):
        try:
            return follow(value[int(parts[0])], ".".join(parts[1:]))
        except ValueError:
            raise LookupError(path) from None
    if isinstance(value, dict):
        for count in range(len(parts), 0, -1):
            key = ".".join(parts[:count])
            if key in value:
                with suppress(LookupError):
                    return follow(value[key], ".".join(parts[count:]))
    raise LookupError(path)


def _paths(value: Any, prefix: str = "") -> list[str]:
    """The dotted paths of all numbers."""
    if isinstance(value, dict):
        return [path for key, item in value.items() for path in _paths(item, f"{prefix}{key}.")]
    if isinstance(value, list):
        return [path for i, item in enumerate(value[:3]) for path in _paths(item, f"{prefix}{i}.")]
    return [prefix[:-1]] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
