"""What the user set, before anything is known of types: from arguments, from Python, from a YAML file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.configuration import checks, schema, suggest, yamlio
from alignlab.errors import ConfigError

GROUPS = (
    "model", "data", "objective", "optim", "engine", "peft", "train", "eval", "logger", "launch", "recipe", "debug",
)  # fmt: skip

COMMAND_LINE = "command line"

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class Setting:
    """One thing the user set: ``raw`` is text from the command line, or a value from a file or from Python."""

    key: str
    raw: Any
    text: bool
    source: str


def from_tokens(tokens: Iterable[str], problems: list[str]) -> list[Setting]:
    found = []
    for token in tokens:
        key, equals, text = token.partition("=")
        if not equals or token.startswith("-"):
            bare = key.lstrip("-").replace("-", "_")
            near = suggest.nearest(bare, {**schema.schema("dpo"), **schema.schema(None)}, GROUPS, 1) if bare else []
            example = f"{near[0]}=..." if near else "optim.learning_rate=1e-5"
            problems.append(f"'{checks.redact(token)}': settings are written key=value, e.g. {example}")
        else:
            found.append(Setting(key, text, True, COMMAND_LINE))
    return found


def from_values(values: Mapping[str, Any]) -> list[Setting]:
    return [Setting(str(key), schema.plain(value), False, COMMAND_LINE) for key, value in values.items()]


def from_file(path: Path) -> list[Setting]:
    content = yamlio.load(path)
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, e.g. 'optim.learning_rate: 1e-5'")
    return [Setting(str(key), value, False, path.name) for key, value in content.items()]


def spread(settings: list[Setting]) -> list[Setting]:
    """Nested mappings as dotted keys, down to keys whose own value is a mapping (``data.columns``)."""
    sections = {key.rpartition(".")[0] for key in schema.schema(None)} | {"objective", "data.condition"}
    found: list[Setting] = []
    for setting in settings:
        if setting.text or not isinstance(setting.raw, dict) or setting.key not in sections:
            found.append(setting)
            continue
        inner = [dataclasses.replace(setting, key=f"{setting.key}.{key}", raw=raw) for key, raw in setting.raw.items()]
        found += spread(inner)
    return found


def forbidden(settings: Iterable[Setting]) -> list[str]:
    problems = []
    for setting in settings:
        key = setting.key
        for part in _keys_inside(key, setting.raw):
            if re.search(r"(^|\.)_(target|partial|recursive|convert|args)_", part):
                problems.append(f"key '{part}': components are chosen by name, never by import path")
        if key.startswith(("+", "~")):
            problems.append(f"key '{key}': keys cannot be added or deleted; write '{key.lstrip('+~')}=...'")
        elif key.split(".")[0] == "hydra" or key.startswith("hydra/"):
            problems.append(f"key '{key}': Hydra's own settings cannot be changed here")
        elif "@" in key or "/" in key or not _KEY.fullmatch(key):
            problems.append(f"'{key}' is not a key; settings are written section.name=value")
        if checks.looks_secret(str(setting.raw)):
            problems.append(f"{key}: looks like a token or a password; put it into the environment (HF_TOKEN, ...)")
    return problems


def foreign_code(of_file: Iterable[Setting], typed: Iterable[Setting]) -> list[str]:
    """Files that ask for a model's own Python to be run, where nobody typed that key: a file may come from anybody."""
    key = "model.trust_remote_code"
    if any(setting.key == key for setting in typed):
        return []
    return [
        f"{setting.source}: {key}: a file cannot ask for a model's own Python to be run; "
        f"if you trust it, put {key}=true on the command line"
        for setting in of_file
        if setting.key == key and setting.raw is not False and setting.raw is not None
    ]


def _keys_inside(key: str, raw: Any) -> Iterable[str]:
    yield key
    if isinstance(raw, dict):
        for inner, value in raw.items():
            yield from _keys_inside(f"{key}.{inner}", value)
    elif isinstance(raw, list):
        for value in raw:
            yield from _keys_inside(key, value)
    elif isinstance(raw, str) and raw[:1] in ("{", "[") and re.search(r"[{,\s]['\"]?_target_['\"]?\s*:", raw):
        yield f"{key}._target_"
