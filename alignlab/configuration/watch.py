"""Which keys of a configuration are read: by attribute, anywhere, without the reader knowing.

A watched configuration is one of subclasses made on the spot: it equals, copies, pickles and flattens like the
original.  What takes all fields alike (``dataclasses.asdict``, ``replace``, comparison, ``schema.flatten``, a
dataclass's own checks) uses none of them and does not count.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any, TypeVar, cast

T = TypeVar("T")

WHOLESALE = ("dataclasses", "copy", "alignlab.configuration.schema", __name__)
"""Modules that read fields because they are there."""
OWN = ("__init__", "__post_init__", "__eq__", "__repr__", "__hash__")
"""A dataclass's own methods that do."""


def watched(config: T, reads: set[str], prefix: str = "") -> T:
    """A copy of the dataclass ``config`` that adds ``prefix`` and the key's dotted name to ``reads`` when one is read.

    Sections are watched too.  ``dataclasses.replace`` of a watched section gives a watched one.
    """
    state = _state(config)
    for name, value in state.items():
        if is_dataclass(value) and not isinstance(value, type):
            state[name] = watched(value, reads, f"{prefix}{name}.")
    return cast(T, _restored(_watching(type(config), reads, prefix), state))


def plain(config: T) -> T:
    """``config`` as it was before it was watched."""
    state = _state(config)
    for name, value in state.items():
        if is_dataclass(value) and not isinstance(value, type):
            state[name] = plain(value)
    return cast(T, _restored(getattr(type(config), "_watched_class", type(config)), state))


def _state(config: Any) -> dict[str, Any]:
    """Fields and whatever else the instance holds."""
    named = {field.name: object.__getattribute__(config, field.name) for field in fields(config)}
    return {**getattr(config, "__dict__", {}), **named}


def _restored(cls: type, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(cls)
    for name, value in state.items():
        object.__setattr__(made, name, value)
    return made


def _watching(cls: type, reads: set[str], prefix: str) -> type:
    names = {field.name for field in fields(cls)}
    getattr_of: Any = cls.__getattribute__

    def __getattribute__(self: Any, name: str) -> Any:
        value = getattr_of(self, name)
        if name in names and not is_dataclass(value) and not _wholesale(sys._getframe(1), self):
            reads.add(prefix + name)
        return value

    def __eq__(self: Any, other: object) -> bool:
        return bool(plain(self) == (plain(other) if is_dataclass(other) and not isinstance(other, type) else other))

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        return watched(copy.deepcopy(plain(self), memo), reads, prefix)

    def __reduce_ex__(self: Any, protocol: int) -> Any:
        return _restored, (cls, _state(plain(self)))

    body = {
        "__getattribute__": __getattribute__,
        "__eq__": __eq__,
        "__hash__": cls.__hash__,
        "__copy__": lambda self: watched(plain(self), reads, prefix),
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "_watched_class": cls,
    }
    return type(cls.__name__, (cls,), body)


def _wholesale(frame: FrameType, config: Any) -> bool:
    if frame.f_globals.get("__name__") in WHOLESALE:
        return True
    return frame.f_code.co_name in OWN and frame.f_locals.get("self") is config
