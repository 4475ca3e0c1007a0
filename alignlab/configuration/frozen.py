"""A run's own ``run.yaml``: written, read back by its workers, and composed from again, wherever that is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig
from alignlab.configuration import plugins, schema, yamlio
from alignlab.configuration.settings import Setting, from_file, spread
from alignlab.errors import ConfigError


def frozen_text(config: RootConfig, provenance: Mapping[str, str]) -> str:
    """``run.yaml``: the whole configuration with who set each key; composing it gives the configuration back."""
    comments = {key: source for key, source in provenance.items() if source != "default"}
    return yamlio.dump(schema.flatten(config), comments)


def load_frozen(folder: Path) -> RootConfig:
    """The configuration a run folder holds, for its workers: no composition, the plug-ins' copies, no other checks."""
    plugins.load_copies(folder / "plugins")
    flat = flat_file(folder / "run.yaml")
    objective = flat.get("objective.name")
    known = schema.schema(objective)
    unknown = sorted(set(flat) - set(known))
    if unknown:
        raise ConfigError(f"{folder / 'run.yaml'}: written by another version: unknown key '{unknown[0]}'")
    try:
        return schema.build(RootConfig, {k: schema.coerce(v, known[k].type) for k, v in flat.items()}, objective)
    except ValueError as error:
        raise ConfigError(f"{folder / 'run.yaml'}: expected {error}") from None


def flat_file(path: Path) -> dict[str, Any]:
    """A YAML file as dotted keys; what lies below a key whose value is itself a mapping stays together."""
    return {setting.key: setting.raw for setting in spread(from_file(path))}


def settings_of(file: Path) -> list[Setting]:
    """What a user's file or a run's own sets; the latter's relative paths mean what they meant where it was started."""
    settings = spread(from_file(file))
    folder = _started_in(file)
    return settings if folder is None else [_where_it_ran(setting, folder) for setting in settings]


def _started_in(file: Path) -> Path | None:
    """The folder in which the run whose ``run.yaml`` this is was started, where that is another one than this."""
    try:
        folder = json.loads((file.parent / "env.json").read_text(encoding="utf-8"))["folder"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if file.name != "run.yaml" or not isinstance(folder, str) or not Path(folder).is_dir():
        return None
    return None if Path(folder).resolve() == Path.cwd() else Path(folder)


def _where_it_ran(setting: Setting, folder: Path) -> Setting:
    def moved(path: Any, *, always: bool = False) -> Any:
        if not isinstance(path, str) or not path:
            return path
        there = folder / path  # an absolute path stays what it is
        return str(there) if always or (there.exists() and not Path(path).exists()) else path

    raw = setting.raw
    if setting.key == "output_dir":
        raw = moved(raw, always=not str(raw).startswith("~"))
    elif setting.key.endswith(("path", "name_or_path")):
        raw = moved(raw)
    elif setting.key == "data.sources" and isinstance(raw, list):
        raw = [{**source, "path": moved(source.get("path"))} if isinstance(source, dict) else source for source in raw]
    return dataclasses.replace(setting, raw=raw)
