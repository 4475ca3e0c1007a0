"""Which option of each group is chosen, what comes with it, and what another choice takes away."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from alignlab.configuration import groups, schema, suggest
from alignlab.configuration.settings import GROUPS, Setting, spread
from alignlab.configuration.values import Values, home
from alignlab.errors import ConfigError
from alignlab.registry import unknown_name

OPEN = {"model": "model.name_or_path", "data": "data.path"}
"""Groups whose value may also be a path or a hub name, and the key it goes to."""

IDENTITY = {
    "model": ("model.name_or_path", "model.revision", "model.tokenizer_name_or_path"),
    "data": ("data.path", "data.eval_path", "data.sources", "data.options"),
}
"""What ``model=...`` or ``data=...`` on the command line replaces of a file's own section."""

CODE = ("plugins", "model.trust_remote_code")
"""Keys that run somebody's Python: for the command line and the user's own YAML, never for a recipe."""

SELECTORS = tuple(f"{group}.name" for group in ("objective", "optim", "engine", "peft", "launch", "debug"))
"""``optim.name=rmsprop`` is ``optim=rmsprop``: the option's file comes with the name."""


def is_choice(setting: Setting) -> bool:
    """Whether a setting chooses an option, and sets no value of its own."""
    return setting.key in GROUPS or setting.key in SELECTORS


def chosen_in(settings: Iterable[Setting], problems: list[str]) -> dict[str, str]:
    """``{group: option}``, the last word winning; names of no option are problems, paths and hub names are not."""
    chosen: dict[str, str] = {}
    for setting in filter(is_choice, settings):
        group, value = _group(setting), setting.raw
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


def base(chosen: dict[str, str]) -> tuple[Values, dict[str, str | None]]:
    """Hydra's composition of the chosen options, with the files that set its values, and the option of every group."""
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
    return Values(flat, provenance), picked


def take(setting: Setting, values: Values) -> None:
    """Note who chose an option (what it sets is in ``values`` already), or take the path, hub name or list given."""
    group, option = _group(setting), str(setting.raw)
    if group in OPEN and option in groups.options(group):
        values.provenance[OPEN[group]] = setting.source
    elif group in OPEN and setting.raw is not None:
        text = schema.from_text(setting.raw, str) if setting.text else option
        values.set(OPEN[group], home(text), setting.source)
    elif group == "logger" and option not in groups.options(group):
        raw = schema.from_text(setting.raw, list[str]) if setting.text else setting.raw
        values.set("logger.names", [str(name) for name in raw], setting.source)
    elif f"{group}.name" in SELECTORS and setting.raw is not None:
        values.set(f"{group}.name", option, setting.source)


def replace(before: dict[str, str], settings: Iterable[Setting], values: Values) -> None:
    """Where the command line chooses another option than the file did, the file's own words on it no longer count."""
    for setting in filter(is_choice, settings):
        group, option = _group(setting), str(setting.raw)
        for key in IDENTITY.get(group, ()):
            values.forget(key)
        if option in groups.options(group) and (group in IDENTITY or before.get(group) not in (None, option)):
            for key, value in groups.option_values(group, option).items():
                if key.startswith(group + "."):
                    source = f"conf/{group}/{option}.yaml"
                    values.set(key, schema.coerce(value, values.known[key].type), source)


def is_stale(setting: Setting, before: dict[str, str], objective: str | None) -> bool:
    """A file's ``objective.*`` keys belong to the objective the file names, not to another one typed over it."""
    return setting.key.startswith("objective.") and before.get("objective") not in (None, objective)


def _group(setting: Setting) -> str:
    return setting.key.partition(".")[0]
