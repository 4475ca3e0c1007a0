"""YAML in and out, for configurations only: bounded, without tags or aliases, and exact on the way back.

PyYAML's safe loader follows YAML 1.1: ``1e-5`` is text, ``no`` is a boolean, the last of two equal keys wins, and a
few hundred bytes of aliases expand without limit.  None of that may happen to a configuration from a collaborator.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from alignlab.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_NODES = 10_000
"""Keys and values of one file: reading so many takes about half a second."""
WIDTH = 60
"""Characters of one value on a screen."""


class _Loader(yaml.SafeLoader):
    """Scalars of YAML 1.2's core schema; equal keys and aliases are errors."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1}: anchors and aliases (& and *) are not allowed here")
        self.nodes = getattr(self, "nodes", 0) + 1
        if self.nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES:,} keys and values, which no configuration needs")
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key must be plain text")
            if key_node.value in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key '{key_node.value}' stands there twice")
            seen.add(key_node.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9_]*|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _construct_map(loader: _Loader, node: Any) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)


def parse(text: str, where: str) -> Any:
    """The value ``text`` stands for; ``where`` names it in the :class:`ConfigError` of anything not allowed."""
    if len(text.encode("utf-8", "surrogateescape")) > MAX_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_BYTES // 1024} KB, which no configuration needs")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def load(path: Path) -> Any:
    """The contents of a YAML file, read in UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES // 1024} KB, which no configuration needs")
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_RESERVED = re.compile(r"(?i)null|true|false|\.inf|\.nan|\.[0-9]+(e[-+]?[0-9]+)?")


def brief(value: Any) -> str:
    """``value`` for people: text as it is, all else as :func:`scalar` has it, cut to ``WIDTH`` characters.

    Of a hash, alone or behind a ``#``, the first digits; they are never cut off, since they tell two values apart.
    """
    text = value if isinstance(value, str) else scalar(value)
    name, mark, digest = text.rpartition("#")
    if re.fullmatch(r"[0-9a-f]{64}", digest):
        return f"{name}{mark}{digest[:8]}"
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def scalar(value: Any) -> str:
    """``value`` on one line, so that :func:`parse` gives it back exactly."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(str(key))}: {scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and not _RESERVED.fullmatch(text):
        return text
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def dump(flat: dict[str, Any], comments: dict[str, str]) -> str:
    """Dotted keys as a nested document, one key a line, each with its comment."""
    lines: list[str] = []
    open_sections: list[str] = []
    for key, value in flat.items():
        *sections, name = key.split(".")
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        lines += ["  " * depth + sections[depth] + ":" for depth in range(shared, len(sections))]
        open_sections = sections
        line = "  " * len(sections) + f"{name}: {scalar(value)}"
        comment = comments.get(key)
        lines.append(f"{line:<44}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"
