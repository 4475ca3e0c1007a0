"""From what the user typed to one typed configuration, and who set each key.

Hydra composes the files under ``conf/`` (groups, recipe, debug).  The user's own values never pass through Hydra's
grammar: their type is the field's, so any path works as typed, and there is no ``++``, no ``_target_`` and no
interpolation to smuggle anything in.  Layers, later wins: dataclass defaults, group files, the objective's file,
recipe, debug, the user's YAML file, the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig, RunConfig
from alignlab.configuration import checks, groups, keys, names, plugins, schema, suggest, yamlio
from alignlab.configuration.settings import (
    COMMAND_LINE,
    GROUPS,
    Setting,
    forbidden,
    foreign_code,
    from_file,
    from_tokens,
    from_values,
    spread,
)
from alignlab.errors import AlignlabError, ConfigError
from alignlab.registry import OBJECTIVES, unknown_name

OPEN = {"model": "model.name_or_path", "data": "data.path"}
"""Groups whose value may also be a path or a hub name, and the key it goes to."""

IDENTITY = {
    "model": ("model.name_or_path", "model.revision", "model.tokenizer_name_or_path"),
    "data": ("data.path", "data.eval_path", "data.sources", "data.options"),
}
"""What ``model=...`` or ``data=...`` on the command line replaces of a file's own section."""

CODE = ("plugins", "model.trust_remote_code")
"""Keys that run somebody's Python: for the command line and the user's own YAML, never for a recipe."""

NEEDED = {
    "model": "model is missing: model=tiny, model=<Hugging Face name> or model=<folder>",
    "data": "data is missing: data=sums, data=<file.jsonl>, data=<hub name> or data.sources=[{{path: ...}}]",
    "objective": "objective is missing: objective={names}",
}

SELECTORS = tuple(f"{group}.name" for group in ("objective", "optim", "engine", "peft", "launch", "debug"))
"""``optim.name=rmsprop`` is ``optim=rmsprop``: the option's file comes with the name."""


@dataclass(frozen=True)
class Composed:
    """A checked configuration.  ``provenance`` names for each key who set it; ``options`` the option of each group.

    ``stated`` are the keys that the user (or a recipe) set: each was meant to do something.
    """

    config: RootConfig
    provenance: dict[str, str]
    options: dict[str, str | None]
    plugins: list[plugins.Plugin] = field(default_factory=list)
    stated: frozenset[str] = frozenset()


def compose(
    tokens: Iterable[str] = (),
    *,
    file: Path | None = None,
    values: Mapping[str, Any] | None = None,
    needs: Iterable[str] = (),
    own: Sequence[str] = (),
) -> Composed:
    """The configuration of ``key=value`` tokens over ``file``; ``values`` are Python values of the same standing.

    Every problem is reported in one :class:`ConfigError`, a line each.  ``needs`` names sections that must be chosen;
    ``own`` are keys of the verb's own, which a misspelt one may have meant.
    """
    problems: list[str] = []
    of_file = spread(from_file(file)) if file else []
    if file and (start := _started_in(file)):
        of_file = [_where_it_ran(setting, start) for setting in of_file]
    settings = [*from_tokens(tokens, problems), *from_values(values or {})]
    problems += forbidden([*of_file, *settings]) + foreign_code(of_file, spread(settings))
    if problems:
        raise ConfigError("\n".join(problems))
    settings = spread(settings)

    loaded = _load_plugins([*of_file, *settings], file)
    chosen = _selections([*of_file, *settings], problems)
    misnamed = any("unknown objective" in problem for problem in problems)
    flat, provenance, picked = _base(chosen)
    below = dict(flat)
    objective = flat.get("objective.name")
    known = schema.schema(objective)
    hints = getattr(OBJECTIVES.get(objective), "hints", {}) if objective else {}

    before = _selections(of_file, [])
    of_file = [s for s in of_file if not _stale_objective(s, before, objective)]
    refused: set[str] = set()
    for layer in (of_file, settings):
        if layer is settings:
            _replace(before, settings, known, flat, provenance)
        for setting in layer:
            if setting.key in GROUPS or setting.key in SELECTORS:
                _select(setting, flat, provenance)
            elif misnamed and setting.key.startswith("objective."):
                continue  # the objective's name was wrong: said already
            elif problem := _apply(setting, known, hints, objective, flat, provenance, own):
                problems.append(problem)
                refused.add(setting.key)
    config = _build(flat, objective, problems)
    if config is not None:
        if file and settings and of_file and provenance.get("run.name") == file.name and config.run.name:
            config = _renamed(config, file, provenance)
        problems += checks.config_problems(config)
        given = {need for need in OPEN if refused & {*IDENTITY[need], need}}  # given, and wrong: said already
        given |= {"objective"} if misnamed else set()
        problems += missing(config, [need for need in needs if need not in given])
    if problems or config is None:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    built = schema.flatten(config)
    provenance = {key: provenance.get(key, "default") for key in built}
    stated = _stated(built, provenance, known, below, of_file, before, picked)
    if file is not None and (recorded := keys.recorded(file)):
        provenance |= {k: recorded[k]["set_by"] for k, by in provenance.items() if by == file.name and k in recorded}
    return Composed(config, provenance, picked, loaded, stated)


def _stated(
    built: dict[str, Any],
    provenance: dict[str, str],
    known: schema.Schema,
    below: dict[str, Any],
    of_file: list[Setting],
    before: dict[str, str],
    picked: dict[str, str | None],
) -> frozenset[str]:
    """The keys that the user or a recipe set, ``below`` being what holds without the user.

    A run's own file states every key: those of its keys count that are not as they would be anyway.  Of a file's
    section whose option the command line replaced, nothing counts.  Nor does a default on the command line that takes
    back what a layer below it said: it has done its work.
    """
    filed = {setting.key: setting.raw for setting in of_file}
    frozen = len(set(built) - set(filed) - set(SELECTORS)) == 0
    found = set()
    for key, source in provenance.items():
        group = key.partition(".")[0]
        anyway = schema.plain(below.get(key, known[key].default))
        if source == COMMAND_LINE:
            earlier = filed.get(key, anyway)
            if built[key] != schema.plain(known[key].default) or str(earlier) == str(built[key]):
                found.add(key)
        elif source.startswith("conf/recipe/"):
            found.add(key)
        elif source != "default" and not source.startswith("conf/"):
            replaced = before.get(group) not in (None, picked.get(group))
            if not replaced and not (frozen and built[key] == anyway):
                found.add(key)
    return frozenset(found)


def _renamed(config: RootConfig, file: Path, provenance: dict[str, str]) -> RootConfig:
    """A run's own file with other numbers typed over it is another run: its automatic name no longer fits."""
    alone = compose(file=file).config
    automatic = config.run.name is not None and config.run.name[:-8] == names.prefix(alone)
    if not automatic or names.stated_keys(alone) == names.stated_keys(config):
        return config
    provenance.pop("run.name")
    return dataclasses.replace(config, run=RunConfig())


def missing(config: RootConfig, needs: Iterable[str]) -> list[str]:
    """One line for each needed section that nobody chose."""
    absent = {
        "model": config.model.name_or_path == schema.REQUIRED,
        "data": config.data.path is None and not config.data.sources,
        "objective": config.objective is None,
    }
    names = "|".join(OBJECTIVES.names())
    return [NEEDED[need].format(names=names) for need in needs if absent[need]]


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


def frozen_text(config: RootConfig, provenance: Mapping[str, str]) -> str:
    """``run.yaml``: the whole configuration with who set each key; composing it gives the configuration back."""
    comments = {key: source for key, source in provenance.items() if source != "default"}
    return yamlio.dump(schema.flatten(config), comments)


def flat_file(path: Path) -> dict[str, Any]:
    """A YAML file as dotted keys; what lies below a key whose value is itself a mapping stays together."""
    return {setting.key: setting.raw for setting in spread(from_file(path))}


def _load_plugins(settings: list[Setting], file: Path | None) -> list[plugins.Plugin]:
    named: list[str] = []
    for setting in settings:
        if setting.key == "plugins":
            raw = schema.from_text(setting.raw, list[str]) if setting.text else setting.raw
            try:
                named = schema.coerce([] if raw is None else raw, list[str])
            except ValueError as error:
                raise ConfigError(f"plugins: expected {error}") from None
    found = plugins.load(named, file.parent if file else None)
    groups.options.cache_clear()
    return found


# ---------------------------------------------------------------------------------------------------------------
# Options of groups
# ---------------------------------------------------------------------------------------------------------------


def _selections(settings: Iterable[Setting], problems: list[str]) -> dict[str, str]:
    """``{group: option}``, the last word winning; names of no option are problems, paths and hub names are not."""
    chosen: dict[str, str] = {}
    for setting in settings:
        group = setting.key.partition(".")[0]
        if setting.key not in GROUPS and setting.key not in SELECTORS:
            continue
        value = setting.raw
        if group == "logger" and (isinstance(value, list) or str(value).startswith("[")):
            chosen.pop("logger", None)
        elif value is None and group in ("objective", *OPEN):
            chosen.pop(group, None)
        elif not isinstance(value, (str, int, float)):
            problems.append(f"{setting.key}: expected the name of an option: {', '.join(groups.options(group))}")
        elif str(value) in groups.options(group):
            chosen[group] = str(value)
        elif group in OPEN:
            chosen.pop(group, None)
        else:
            problems.append(
                f"{setting.source}: " * (not setting.text)
                + unknown_name(group, str(value), list(groups.options(group)))
            )
    return chosen


def _select(setting: Setting, flat: dict[str, Any], provenance: dict[str, str]) -> None:
    """Note who chose an option (its values are in ``flat`` already), or take the path, hub name or list given."""
    group = setting.key.partition(".")[0]
    option = str(setting.raw)
    if group in OPEN and option in groups.options(group):
        provenance[OPEN[group]] = setting.source
    elif group in OPEN and setting.raw is not None:
        text = schema.from_text(setting.raw, str) if setting.text else option
        _set(OPEN[group], _home(text), setting.source, flat, provenance)
    elif group == "logger" and option not in groups.options(group):
        raw = schema.from_text(setting.raw, list[str]) if setting.text else setting.raw
        names = [str(name) for name in raw]
        _set("logger.names", names, setting.source, flat, provenance)
    elif f"{group}.name" in SELECTORS and setting.raw is not None:
        _set(f"{group}.name", option, setting.source, flat, provenance)


def _replace(
    before: dict[str, str],
    settings: list[Setting],
    known: schema.Schema,
    flat: dict[str, Any],
    provenance: dict[str, str],
) -> None:
    """Where the command line chooses another option than the file did, the file's own words on it no longer count."""
    for setting in settings:
        group = setting.key.partition(".")[0]
        if setting.key not in GROUPS and setting.key not in SELECTORS:
            continue
        option = str(setting.raw)
        for key in IDENTITY.get(group, ()):
            flat.pop(key, None)
            provenance.pop(key, None)
        if option in groups.options(group) and (group in IDENTITY or before.get(group) not in (None, option)):
            for key, value in groups.option_values(group, option).items():
                if key.startswith(group + "."):
                    _set(key, schema.coerce(value, known[key].type), f"conf/{group}/{option}.yaml", flat, provenance)


def _stale_objective(setting: Setting, before: dict[str, str], objective: str | None) -> bool:
    """A file's ``objective.*`` keys belong to the objective the file names, not to another one typed over it."""
    return setting.key.startswith("objective.") and before.get("objective") not in (None, objective)


def _base(chosen: dict[str, str]) -> tuple[dict[str, Any], dict[str, str], dict[str, str | None]]:
    """Hydra's composition of the chosen options: values, who set them, and the option of every group."""
    content, picked = groups.composed(frozenset(chosen.items()))
    picked |= chosen
    provenance: dict[str, str] = {}
    for group in (*(g for g in GROUPS if g not in ("objective", "recipe", "debug")), "objective", "recipe", "debug"):
        option = picked[group]
        for key in groups.option_values(group, option) if option else {}:
            if key in CODE:
                raise ConfigError(f"conf/{group}/{option}.yaml: {key} can be set by the user only")
            provenance[key] = f"conf/{group}/{option}.yaml"
    objective = content.pop("objective", None) or {}
    name = chosen.get("objective") or objective.get("name")
    settings = spread([Setting(str(key), value, False, "") for key, value in content.items()])
    flat: dict[str, Any] = {"objective.name": name} if name else {}
    flat |= {f"objective.{key}": value for key, value in objective.items()}
    known = schema.schema(name)
    for key, value in {**flat, **{setting.key: setting.raw for setting in settings}}.items():
        if key not in known:
            raise suggest.unknown_key(key, known, GROUPS, {})
        flat[key] = value if value == schema.REQUIRED else schema.coerce(value, known[key].type)
    return flat, provenance, picked


# ---------------------------------------------------------------------------------------------------------------
# One value
# ---------------------------------------------------------------------------------------------------------------


def _set(key: str, value: Any, source: str, flat: dict[str, Any], provenance: dict[str, str]) -> None:
    flat[key] = value
    provenance[key] = source


def _apply(
    setting: Setting,
    known: schema.Schema,
    hints: dict[str, str],
    objective: str | None,
    flat: dict[str, Any],
    provenance: dict[str, str],
    own: Sequence[str],
) -> str | None:
    """Set one key, or say in one line why not."""
    at = "" if setting.text or setting.source == COMMAND_LINE else f"{setting.source}: "
    key, raw = setting.key, setting.raw
    if key == "reference" and str(raw).lower() in ("true", "false"):
        key = "reference.compute"
    elif key == "reference" and isinstance(raw, str):
        key = "reference.name_or_path"
    owner = key if key in known else _mapping_above(key, known)
    if owner is None:
        return at + _unknown(key, known, hints, objective, own)
    kind = known[owner].type
    try:
        if owner != key:
            entries = dict(flat.get(owner) or {})
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
        value = _home(value)
    _set(key, value, setting.source, flat, provenance)
    return None


def _mapping_above(key: str, known: schema.Schema) -> str | None:
    owner = key
    while "." in owner:
        owner = owner.rpartition(".")[0]
        if owner in known:
            return owner if schema.is_mapping(known[owner].type) else None
    return None


def _free(text: str) -> Any:
    """Text below a key of the user's own: a number, a list and a truth value are what they look like."""
    try:
        return yamlio.parse(text, text)
    except ConfigError:
        return text


def _home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~/") and not Path(path).exists() else path


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
    """``setting`` of a run's own file with relative paths meaning what they meant where the run was started."""

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


def _unknown(key: str, known: schema.Schema, hints: dict[str, str], objective: str | None, own: Sequence[str]) -> str:
    if key == "objective" or not key.startswith("objective."):
        if near := difflib.get_close_matches(key, own, n=1, cutoff=0.8):
            return f"unknown key '{key}': did you mean {near[0]}?"
        return str(suggest.unknown_key(key, known, GROUPS, {}))
    if objective is None:
        return f"unknown key '{key}': choose the objective first, objective={'|'.join(OBJECTIVES.names())}"
    leaf = key.partition(".")[2]
    if leaf not in hints:
        for name in OBJECTIVES.names():
            try:
                if name != objective and key in schema.schema(name):
                    return f"unknown key '{key}': it belongs to objective={name}, and this is objective={objective}"
            except AlignlabError:  # a broken plug-in is no reason to hide the first error
                continue
    return str(suggest.unknown_key(key, known, GROUPS, hints))


def _build(flat: dict[str, Any], objective: str | None, problems: list[str]) -> RootConfig | None:
    try:
        return schema.build(RootConfig, flat, objective)
    except ConfigError as error:
        problems.append(str(error))
    except (ValueError, TypeError) as error:
        problems.append(f"objective={objective}: {error}")
    return None
