"""``{seed}``, ``{rows}``, ``{recipe}``, ``{data.X}``, ``{run.X}``, ``{model.X}`` in the texts of a scale file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

PLAIN = ("seed", "rows", "recipe")
DOTTED = ("data", "run", "model")
_FIELD = re.compile(r"\{([a-z_]+)(?:\.([A-Za-z0-9_-]+))?\}")


def fields(value: Any) -> Iterator[tuple[str, str]]:
    """Each field as (kind, name) in all texts of ``value``; the name is empty for the plain ones."""
    if isinstance(value, str):
        yield from ((kind, name or "") for kind, name in _FIELD.findall(value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from fields(item)
    elif isinstance(value, list):
        for item in value:
            yield from fields(item)


def known(kind: str, name: str) -> bool:
    """Whether there is such a field."""
    return kind in (DOTTED if name else PLAIN)


def filled(value: Any, fill: Callable[[str, str], str | None]) -> Any:
    """``value`` with ``fill(kind, name)`` in place of each field; a field for which it says None stays.

    A text that holds the seed and becomes a whole number is one: ``"{seed}01"`` is the number 301 for seed 3.
    """
    if isinstance(value, dict):
        return {key: filled(item, fill) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, fill) for item in value]
    if not isinstance(value, str):
        return value

    def put(match: re.Match[str]) -> str:
        said = fill(match[1], match[2] or "")
        return match[0] if said is None else said

    text = _FIELD.sub(put, value)
    return int(text) if "{seed}" in value and re.fullmatch(r"\d+", text) else text
