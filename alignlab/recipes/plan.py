"""From a scale file to stages that can be done: composed, checked, and named by a hash of all that goes into them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab import liveness
from alignlab.configuration import names, schema, yamlio
from alignlab.configuration.settings import Setting, spread
from alignlab.errors import ConfigError
from alignlab.recipes import fields
from alignlab.recipes.scale import MODELS, READS, Scale, Stage, merged
from alignlab.request import Request, make_request
from alignlab.verb_table import VERBS
from alignlab.verbs.loop import Options as LoopOptions

PLACE = ("engine.", "launch.", "run.", "logger.", "output_dir", "resume", "resume_allow", "overwrite", "data.num_proc")
"""Keys (or sections) that say where and on what a stage runs: the result's place, not the result."""


@dataclass(frozen=True)
class Case:
    """What is to be done: a scale with a seed, the user's own changes, and at most one deliberately wrong setting."""

    scale: Scale
    seed: int
    rows: Path | None = None
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """by stage: key -> value"""
    broken: str | None = None
    only: tuple[str, ...] = ()
    """stages; empty: all"""

    @property
    def name(self) -> str:
        return f"{self.scale.recipe} {self.scale.name} seed {self.seed}" + (f" {self.broken}" if self.broken else "")


@dataclass(frozen=True)
class Planned:
    """One stage of a case.  ``settings`` are filled but for the folders of other stages."""

    spec: Stage
    folder: Path
    key: str
    settings: dict[str, Any]
    inputs: dict[str, Any]
    """everything that its result depends on, other stages by their names"""
    named: dict[str, Any]
    """the same, other stages by their keys"""
    needs: dict[str, Planned]
    seed: int
    request: Request | None = None
    """composed and checked, other stages' folders by name (train, loop, prepare)"""

    @property
    def run(self) -> Path:
        """The stage's run, for a loop that of its last round; for other kinds its folder."""
        if self.spec.kind == "train":
            return self.folder / "run"
        if self.spec.kind == "loop":
            rounds = self.settings.get("rounds", LoopOptions.rounds)
            return self.folder / "loops" / "run" / f"round-{rounds}" / "train" / "run"
        return self.folder

    @property
    def model(self) -> Path | None:
        return self.run / "model" if self.spec.kind in MODELS else None

    def filled(self) -> dict[str, Any]:
        """The settings with the folders of the stages it needs."""

        def fill(kind: str, name: str) -> str | None:
            if kind == "run":
                return str(self.needs[name].run)
            return str(self.needs[name].model) if kind == "model" else None

        found: dict[str, Any] = fields.filled(self.settings, fill)
        return found


def plan(case: Case, home: Path) -> dict[str, Planned]:
    """The stages of a case in order; ``home/stages`` is where they live.  Every wrong setting is reported."""
    scale, found, problems = case.scale, dict[str, Planned](), list[str]()
    _check_changes(case)
    wanted = scale.needed(_wanted(case))
    for name in wanted:
        spec = scale.stages[name]
        try:
            found[name] = _planned(case, spec, found, home)
        except ConfigError as error:
            lines = str(error).splitlines()
            problems += [f"{spec.file}: stages.{name}: {line.removeprefix(f'{spec.file.name}: ')}" for line in lines]
            break  # what comes after needs it, more often than not
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _wanted(case: Case) -> list[str]:
    scale = case.scale
    if case.broken:
        return scale.stages_of(scale.metrics[scale.broken[case.broken].metric])
    return list(case.only) or list(scale.stages)


def _check_changes(case: Case) -> None:
    scale = case.scale
    for stage in (*case.changes, *case.only):
        if stage not in scale.stages:
            raise ConfigError(f"{scale.file}: no such stage: {stage} (known: {', '.join(scale.stages)})")


def _planned(case: Case, spec: Stage, before: dict[str, Planned], home: Path) -> Planned:
    settings = copy.deepcopy(spec.settings)
    if case.broken and case.scale.broken[case.broken].stage == spec.name:
        settings = merged(settings, case.scale.broken[case.broken].set)
    settings = merged(settings, case.changes.get(spec.name, {}))
    settings = fields.filled(settings, _filler(case, spec))
    if spec.kind != "run":
        settings = _flat(settings, spec)
        settings.setdefault("seed", case.seed)
    if spec.start is not None:
        settings.pop("model", None)
        settings["model.name_or_path"] = "{model." + spec.start + "}"
    needs = {name: before[name] for name in spec.needs}
    request = _composed(spec, settings) if spec.kind in ("train", "loop", "prepare") else None
    if request is not None:
        inputs = _of_config(request) | {key: value for key, value in settings.items() if key in VERBS[spec.kind].own}
    elif spec.kind in READS:
        inputs = {key: _identified(value) for key, value in settings.items()} | {"on": _named("run", spec.on)}
    else:
        inputs = {"code": _code(spec.file.parent), "function": spec.function, "seed": case.seed,
                  "with": {key: _identified(value) for key, value in settings.items()}}  # fmt: skip
    inputs = {key: schema.plain(value) for key, value in inputs.items()}
    # For ``run`` a stage's name is an argument; elsewhere only what the stage is counts.
    of = {name: one.key for name, one in needs.items()}
    said = {_named(kind, name): f"<{kind} {key}>" for name, key in of.items() for kind in ("run", "model")}
    named = _renamed(inputs, said)
    content = {
        "kind": spec.kind,
        "inputs": named if request is None else stated(named),
        "needs": of if spec.kind == "run" else sorted(of.values()),
    }
    key = names.digest(content)
    folder = home / "stages" / f"{_label(spec, settings)}-{key[:12]}"
    return Planned(spec, folder, key, settings, inputs, named, needs, case.seed, request)


def stated(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as it would be anyway: a key that alignlab gets one day makes no stage another one."""
    known = schema.schema(inputs.get("objective.name"))
    own = ("objective.name",)  # its default is what it is
    return {k: v for k, v in inputs.items() if k in own or k not in known or v != schema.plain(known[k].default)}


def _label(spec: Stage, settings: dict[str, Any]) -> str:
    if spec.kind == "run":
        return spec.function.partition(":")[2].replace("_", "-")
    objective = settings.get("objective") or settings.get("objective.name")
    return str(objective) if spec.kind == "train" else spec.kind


def _filler(case: Case, spec: Stage) -> Callable[[str, str], str | None]:
    def fill(kind: str, name: str) -> str | None:
        if kind == "seed":
            return str(case.seed)
        if kind == "rows":
            return _rows(case)
        if kind == "recipe":
            return str(spec.file.parent)
        if kind == "data":
            return _data(case, name)
        return None

    return fill


def _rows(case: Case) -> str:
    if case.rows is None:
        raise ConfigError(f"reads rows from a folder: say rows=FOLDER ({case.scale.folder / 'README.md'} says which)")
    return str(case.rows)


def _data(case: Case, name: str) -> str:
    """The file, or the hub's name where the user has no folder of rows."""
    value = case.scale.data[name]
    sides = value if isinstance(value, dict) else {"file": value}
    text = sides["hub"] if "hub" in sides and (case.rows is None or "file" not in sides) else sides["file"]
    if "{rows}" in text:
        text = text.replace("{rows}", _rows(case))
        if not Path(text).exists():
            raise ConfigError(f"data.{name}: no such file: {text}")
    return str(text.replace("{seed}", str(case.seed)).replace("{recipe}", str(case.scale.folder)))


def _flat(settings: dict[str, Any], spec: Stage) -> dict[str, Any]:
    """Dotted keys, a later one after an earlier one of its section; plug-ins of the recipe by their paths."""
    found = {one.key: one.raw for one in spread([Setting(key, value, False, "") for key, value in settings.items()])}
    if isinstance(found.get("plugins"), list):
        beside = spec.file.parent
        found["plugins"] = [str(beside / p) if (beside / str(p)).is_file() else p for p in found["plugins"]]
    return found


def _composed(spec: Stage, settings: dict[str, Any]) -> Request:
    """The checked request.  Folders of stages that are not done are names that no file has."""
    values = {key: value for key, value in settings.items() if key not in VERBS[spec.kind].own}
    values = {key: _standing_in(value) for key, value in values.items()}
    request = make_request(spec.kind, [], values)
    if spec.kind != "loop":
        liveness.gate(request)
    return request


def _standing_in(value: Any) -> Any:
    """Texts with a folder that is not there yet, without what would make them paths of files."""
    if isinstance(value, dict):
        return {key: _standing_in(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_standing_in(item) for item in value]
    held = isinstance(value, str) and any(kind in ("run", "model") for kind, _ in fields.fields(value))
    if not held:
        return value
    return fields.filled(value, lambda kind, name: _named(kind, name)).replace(".", "_")


def _named(kind: str, name: str | None) -> str:
    """A stage's folder before it has one: no path, and no part of another one's."""
    return f"<{kind} {(name or '').replace('.', '_')}>"


def _renamed(value: Any, said: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, said) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, said) for item in value]
    if isinstance(value, str) and "<" in value:
        for old, new in said.items():
            value = value.replace(old, new)
    return value


def _of_config(request: Request) -> dict[str, Any]:
    """Every key but those of :data:`PLACE`, local files by their contents."""
    flat = {**schema.flatten(request.config), **names.number_keys(request.config)}
    return {k: v for k, v in flat.items() if not any(k.startswith(p) if p.endswith(".") else k == p for p in PLACE)}


def _identified(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _identified(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_identified(item) for item in value]
    if isinstance(value, str):
        return names.identify(value) if "/" in value and "{" not in value else _standing_in(value)
    return value


def _code(folder: Path) -> dict[str, str]:
    """Every Python file of the recipe: a function may import from its neighbours."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in sorted(folder.glob("*.py"))}


def settings_text(settings: Mapping[str, Any]) -> str:
    """A file of settings: one dotted key a line."""
    return "".join(f"{yamlio.scalar(key)}: {yamlio.scalar(schema.plain(value))}\n" for key, value in settings.items())


def token(key: str, value: Any) -> str:
    """A setting as it is typed: text as it is, everything else in YAML's flow style."""
    return f"{key}={value if isinstance(value, str) else yamlio.scalar(schema.plain(value))}"
