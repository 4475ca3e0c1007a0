"""From what the user typed to one typed configuration, and who set each key.

Hydra composes the files under ``conf/`` (groups, recipe, debug).  The user's own values never pass through Hydra's
grammar: their type is the field's, so any path works as typed, and there is no ``++``, no ``_target_`` and no
interpolation to smuggle anything in.  Layers, later wins: dataclass defaults, group files, the objective's file,
recipe, debug, the user's YAML file, the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab.config import RootConfig, RunConfig
from alignlab.configuration import checks, choices, groups, keys, names, plugins, schema
from alignlab.configuration.frozen import settings_of
from alignlab.configuration.settings import (
    COMMAND_LINE,
    Setting,
    forbidden,
    foreign_code,
    from_tokens,
    from_values,
    spread,
)
from alignlab.errors import ConfigError
from alignlab.registry import OBJECTIVES

NEEDED = {
    "model": "model is missing: model=tiny, model=<Hugging Face name> or model=<folder>",
    "data": "data is missing: data=sums, data=<file.jsonl>, data=<hub name> or data.sources=[{{path: ...}}]",
    "objective": "objective is missing: objective={names}",
}


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
    of_file = settings_of(file) if file else []
    settings = [*from_tokens(tokens, problems), *from_values(values or {})]
    problems += forbidden([*of_file, *settings]) + foreign_code(of_file, spread(settings))
    if problems:
        raise ConfigError("\n".join(problems))
    settings = spread(settings)

    loaded = _load_plugins([*of_file, *settings], file)
    chosen = choices.chosen_in([*of_file, *settings], problems)
    misnamed = any("unknown objective" in problem for problem in problems)
    made, picked = choices.base(chosen)
    below = dict(made.flat)

    before = choices.chosen_in(of_file, [])
    of_file = [s for s in of_file if not choices.is_stale(s, before, made.objective)]
    refused: set[str] = set()
    for layer in (of_file, settings):
        if layer is settings:
            choices.replace(before, settings, made)
        for setting in layer:
            if choices.is_choice(setting):
                choices.take(setting, made)
            elif misnamed and setting.key.startswith("objective."):
                continue  # the objective's name was wrong: said already
            elif problem := made.take(setting, own):
                problems.append(problem)
                refused.add(setting.key)
    config = made.built(problems)
    if config is not None:
        if file and settings and of_file and made.provenance.get("run.name") == file.name and config.run.name:
            config = _renamed(config, file, made.provenance)
        problems += checks.config_problems(config)
        # What was given and is wrong has been said already.
        given = {need for need in choices.OPEN if refused & {*choices.IDENTITY[need], need}}
        given |= {"objective"} if misnamed else set()
        problems += missing(config, [need for need in needs if need not in given])
    if problems or config is None:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    built = schema.flatten(config)
    provenance = {key: made.provenance.get(key, "default") for key in built}
    stated = _stated(built, provenance, made.known, below, of_file, before, picked)
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
    frozen = len(set(built) - set(filed) - set(choices.SELECTORS)) == 0
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
