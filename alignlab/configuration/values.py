"""The configuration while it is composed: one value a key, of the key's own type, and who set it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig
from alignlab.configuration import checks, groups, schema, suggest, yamlio
from alignlab.configuration.settings import COMMAND_LINE, GROUPS, Setting
from alignlab.errors import AlignlabError, ConfigError
from alignlab.registry import OBJECTIVES


class Values:
    """``flat`` holds what is set so far, by dotted key; ``provenance`` who set it.

    ``objective`` is the one whose keys are ``known``; None where none is chosen, and none of its keys is known.
    """

    def __init__(self, flat: dict[str, Any], provenance: dict[str, str]) -> None:
        self.flat, self.provenance = flat, provenance
        self.objective: str | None = flat.get("objective.name")
        self.known = schema.schema(self.objective)
        self._hints = getattr(OBJECTIVES.get(self.objective), "hints", {}) if self.objective else {}

    def set(self, key: str, value: Any, source: str) -> None:
        """Set a key to a value of its type."""
        self.flat[key] = value
        self.provenance[key] = source

    def forget(self, key: str) -> None:
        """As if nobody had set ``key``."""
        self.flat.pop(key, None)
        self.provenance.pop(key, None)

    def take(self, setting: Setting, own: Sequence[str] = ()) -> str | None:
        """Set what a user set, or say in one line why not; ``own`` are a verb's keys, which a misspelt one may mean."""
        at = "" if setting.text or setting.source == COMMAND_LINE else f"{setting.source}: "
        key, raw = setting.key, setting.raw
        if key == "reference" and str(raw).lower() in ("true", "false"):
            key = "reference.compute"
        elif key == "reference" and isinstance(raw, str):
            key = "reference.name_or_path"
        owner = key if key in self.known else self._mapping_above(key)
        if owner is None:
            return at + self._unknown(key, own)
        kind = self.known[owner].type
        try:
            if owner != key:
                entries = dict(self.flat.get(owner) or {})
                inner = _free(raw) if setting.text else raw
                raw, key = {**entries, key[len(owner) + 1 :]: inner}, owner
            elif setting.text:
                raw = schema.from_text(raw, kind)
            if key == "data.sources" and isinstance(raw, list):
                raw = [groups.named_source(entry) for entry in raw]
            value = schema.coerce(raw, kind)
            expected = checks.value_problem(key, value)
        except ValueError as error:
            expected = f"expected {error}"
        except ConfigError as error:
            expected = str(error)
        if expected:
            shown = setting.raw if setting.text else yamlio.scalar(schema.plain(setting.raw))
            return f"{at}{setting.key}: {checks.redact(shown)} ({expected})"
        if key.endswith(("path", "name_or_path")) and isinstance(value, str):
            value = home(value)
        self.set(key, value, setting.source)
        return None

    def built(self, problems: list[str]) -> RootConfig | None:
        """The typed configuration; None, and a line in ``problems``, where the values do not make one."""
        try:
            return schema.build(RootConfig, self.flat, self.objective)
        except ConfigError as error:
            problems.append(str(error))
        except (ValueError, TypeError) as error:
            problems.append(f"objective={self.objective}: {error}")
        return None

    def _mapping_above(self, key: str) -> str | None:
        owner = key
        while "." in owner:
            owner = owner.rpartition(".")[0]
            if owner in self.known:
                return owner if schema.is_mapping(self.known[owner].type) else None
        return None

    def _unknown(self, key: str, own: Sequence[str]) -> str:
        if key == "objective" or not key.startswith("objective."):
            if near := difflib.get_close_matches(key, own, n=1, cutoff=0.8):
                return f"unknown key '{key}': did you mean {near[0]}?"
            return str(suggest.unknown_key(key, self.known, GROUPS, {}))
        if self.objective is None:
            return f"unknown key '{key}': choose the objective first, objective={'|'.join(OBJECTIVES.names())}"
        if key.partition(".")[2] not in self._hints:
            for name in OBJECTIVES.names():
                try:
                    if name != self.objective and key in schema.schema(name):
                        here = f"this is objective={self.objective}"
                        return f"unknown key '{key}': it belongs to objective={name}, and {here}"
                except AlignlabError:  # a broken plug-in is no reason to hide the first error
                    continue
        return str(suggest.unknown_key(key, self.known, GROUPS, self._hints))


def home(path: str) -> str:
    """``path`` with ``~/`` written out, unless there is a folder of that name."""
    return str(Path(path).expanduser()) if path.startswith("~/") and not Path(path).exists() else path


def _free(text: str) -> Any:
    """Text below a key of the user's own: a number, a list and a truth value are what they look like."""
    try:
        return yamlio.parse(text, text)
    except ConfigError:
        return text
