"""What keys exist and what values they take, read off the dataclasses; nothing here knows Hydra.

The command line gives text and a file gives values; both become typed values through :func:`from_text` and
:func:`coerce`.  Which text is a list, a number or a path is decided by the field's type, never by its looks, so a
file may be called ``true`` or ``a=[1,2]``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from alignlab.config import RootConfig
from alignlab.configuration import yamlio
from alignlab.registry import OBJECTIVES

REQUIRED = "???"


@dataclass(frozen=True)
class Key:
    """One key a user can set: its dotted name, its type, its default."""

    name: str
    type: Any
    default: Any


Schema = dict[str, Key]


@cache
def objective_config(name: str) -> type:
    """The objective's ``Config`` with a field ``name`` added: the type of the section ``objective``."""
    base = OBJECTIVES.get(name).Config
    if "name" in {f.name for f in dataclasses.fields(base)}:
        return base
    frozen = base.__dataclass_params__.frozen
    made = dataclasses.make_dataclass(
        base.__name__, [("name", str, dataclasses.field(default=name))], bases=(base,), frozen=frozen
    )
    made.__module__ = base.__module__
    made.__doc__ = base.__doc__
    return made


def schema(objective: str | None) -> Schema:
    """Every key of the configuration, with the section of ``objective`` (None: without that section)."""
    keys = {key.name: key for key in _walk(RootConfig, "") if key.name != "objective"}
    if objective is not None:
        section = objective_config(objective)
        keys["objective.name"] = Key("objective.name", str, objective)
        keys.update({key.name: key for key in _walk(section, "objective.") if key.name != "objective.name"})
    return keys


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            hints.update(typing.get_type_hints(base))
    return hints


def _walk(cls: type, prefix: str) -> typing.Iterator[Key]:
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints.get(field.name, Any)
        if is_dataclass(kind):
            yield from _walk(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield Key(prefix + field.name, kind, _default(field))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else REQUIRED


def build(cls: type, values: dict[str, Any], objective: str | None, prefix: str = "") -> Any:
    """An instance of ``cls`` from dotted keys; what is not in ``values`` keeps its default."""
    arguments: dict[str, Any] = {}
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        kind = hints.get(field.name, Any)
        if key == "objective" and cls is RootConfig:
            arguments["objective"] = (
                build(objective_config(objective), values, objective, "objective.") if objective else None
            )
        elif is_dataclass(kind):
            arguments[field.name] = build(typing.cast(type, kind), values, objective, key + ".")
        elif key in values:
            arguments[field.name] = values[key]
    return cls(**arguments)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys that two flat mappings do not have alike: (of the first, of the second), None where one lacks it."""
    return {
        key: (one.get(key), other.get(key)) for key in dict.fromkeys((*one, *other)) if one.get(key) != other.get(key)
    }


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The configuration as dotted keys and plain values; the inverse of :func:`build`."""
    flat: dict[str, Any] = {}
    names = [f.name for f in dataclasses.fields(config)]
    if prefix == "objective.":
        names = ["name", *(name for name in names if name != "name")]
    for name in names:
        value = getattr(config, name)
        if is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = plain(value)
    if not prefix and flat.get("objective", 0) is None:
        del flat["objective"]
    return flat


def plain(value: Any) -> Any:
    """``value`` in the types that YAML and JSON have."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain(item) for key, item in dataclasses.asdict(value).items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------


def members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a type: ``int | None`` has two, everything else one."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def is_mapping(kind: Any) -> bool:
    """Whether keys below this one are the user's own (``data.columns.prompt=question``)."""
    return any(typing.get_origin(member) is dict or member is dict for member in members(kind))


def from_text(text: str, kind: Any) -> Any:
    """Command-line text as the raw value that :func:`coerce` takes for a field of type ``kind``."""
    alternatives = members(kind)
    if text == "null" and type(None) in alternatives:
        return None
    containers = [m for m in alternatives if (typing.get_origin(m) or m) in (list, tuple, dict, Any)]
    if containers and text[:1] in "[{" and text[:1]:
        return _flow(text)
    if Any in alternatives:
        return _flow(text)
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _flow(text: str) -> Any:
    value = yamlio.parse(text, text if len(text) < 60 else text[:57] + "...")
    if _glued(value):
        # Hydra's grammar takes {path:a.jsonl}, which in YAML is one key without a value.
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import OverrideParseException

        try:
            return OverridesParser.create().parse_override(f"value={text}").value()
        except OverrideParseException:
            return value
    return value


def _glued(value: Any) -> bool:
    if isinstance(value, dict):
        return any((item is None and ":" in key) or _glued(item) for key, item in value.items())
    return isinstance(value, list) and any(_glued(item) for item in value)


def coerce(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``; ValueError says in a few words what was expected."""
    alternatives = members(kind)
    if len(alternatives) > 1:
        if value is None and type(None) in alternatives:
            return None
        # Narrow types first: "3" for int | str is a number, and a list is never the text of a list.
        order = [bool, int, float]
        ranked = sorted(
            (m for m in alternatives if m is not type(None)),
            key=lambda m: (m is str, order.index(m) if m in order else 9),
        )
        problems = []
        for member in ranked:
            try:
                return coerce(value, member)
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(" or ".join(dict.fromkeys(problems)) + (" or null" if type(None) in alternatives else ""))
    return _coerce(value, alternatives[0])


def _coerce(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise ValueError("one of " + ", ".join(map(str, arguments)))
    if kind is bool:
        return _boolean(value)
    if kind is int:
        return _integer(value)
    if kind is float:
        return _float(value)
    if kind is str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (str, int, float)):
            return str(value)
        raise ValueError("text")
    if origin in (list, tuple) or kind in (list, tuple):
        item_kind = arguments[0] if arguments else Any
        items = value if isinstance(value, (list, tuple)) else [value]
        if value is None or (isinstance(value, dict) and not is_dataclass(item_kind)):
            raise ValueError("a list, [a, b]")
        made = [coerce(item, item_kind) for item in items]
        return tuple(made) if (origin or kind) is tuple else made
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise ValueError("a mapping, {a: b}")
        item_kind = arguments[1] if arguments else Any
        return {str(key): coerce(item, item_kind) for key, item in value.items()}
    if is_dataclass(kind):
        return _instance(value, typing.cast(type, kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        for member in kind:
            if value in (member, member.value, member.name):
                return member
        raise ValueError("one of " + ", ".join(str(member.value) for member in kind))
    return value


def _instance(value: Any, cls: type) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a mapping with {', '.join(f.name for f in dataclasses.fields(cls))}")
    hints = _hints(cls)
    arguments: dict[str, Any] = {}
    for key, item in value.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            known = f"did you mean {near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ValueError(f"no key '{key}' inside ({known})")
        try:
            arguments[key] = coerce(item, hints[key])
        except ValueError as error:
            raise ValueError(f"{error} for {key}") from None
    missing = [f.name for f in dataclasses.fields(cls) if _default(f) == REQUIRED and f.name not in arguments]
    if missing:
        raise ValueError(f"a mapping with {', '.join(missing)}")
    return cls(**arguments)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("true or false")


def _integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9][0-9_]*", value):
        return int(value)
    if isinstance(value, (str, float)):
        try:
            number = float(value)
        except ValueError:
            raise ValueError("a whole number") from None
        if math.isfinite(number) and number == int(number):
            return int(number)
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("a whole number")


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError("a number") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


@cache
def documentation(cls: type) -> dict[str, str]:
    """``{field: the string under it}``, from the source; empty where the source is not at hand."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError, IndentationError):
            continue
        statements = getattr(body, "body", [])
        for field, text in itertools.pairwise(statements):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = " ".join(text.value.value.split())
    return found
