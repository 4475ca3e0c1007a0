"""Scale files read and checked.  The schema is closed; every problem is reported, a line each, with file and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignlab.configuration import yamlio
from alignlab.errors import ConfigError
from alignlab.recipes import fields
from alignlab.recipes.scale import KINDS, MODELS, READS, TRAINS, Broken, Metric, Scale, Stage, merged
from alignlab.recipes.shelf import file_of

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_FILE_KEYS = (
    "title", "seconds", "memory_gib", "hardware", "include", "data", "settings", "stages", "metrics", "broken",
)  # fmt: skip
_INCLUDED_KEYS = ("data", "settings", "stages")
_METRIC_KEYS = ("say", "value", "minus", "over", "chance", "published")
_BROKEN_KEYS = ("say", "stage", "set", "metric")


def read(recipe: Path, scale: str) -> Scale:
    """Read and check ``<recipe>/<scale>.yaml``."""
    return _Reader(file_of(recipe, scale)).scale(recipe.name, scale)


def known_text(name: Any, known: Iterable[str]) -> str:
    """What to say of a name that is not there: the nearest one, else all."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"


class _Reader:
    """One file, its includes, and the problems found so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[str] = []

    def bad(self, key: str, what: str, file: Path | None = None) -> None:
        self.problems.append(f"{file or self.file}: {key}: {what}")

    def scale(self, recipe: str, name: str) -> Scale:
        content = self.mapping(yamlio.load(self.file), "the file")
        self.closed(content, _FILE_KEYS, "")
        data, common, stages = self.included(content.get("include"))
        data |= self.mapping(content.get("data"), "data")
        common = merged(common, self.mapping(content.get("settings"), "settings"))
        own = self.stages(self.mapping(content.get("stages"), "stages"), common, self.file)
        for twice in sorted(set(own) & set(stages)):
            self.bad(f"stages.{twice}", f"is a stage of {stages[twice].file.name} already; choose another name")
        stages |= own
        if not stages:
            self.bad("stages", "at least one is needed")
        self.references(stages, data)
        metrics: dict[str, Metric] = {}
        for key, value in self.mapping(content.get("metrics"), "metrics").items():
            if (metric := self.metric(key, value, stages)) is not None:
                metrics[key] = metric
        broken: dict[str, Broken] = {}
        for key, value in self.mapping(content.get("broken"), "broken").items():
            if (wrong := self.wrong(key, value, stages, metrics)) is not None:
                broken[key] = wrong
        title = self.text(content, "title", "")
        if not title:
            self.bad("title", "is missing: one line that says what is reproduced")
        numbers = {key: self.number(content, key) for key in ("seconds", "memory_gib")}
        hardware = self.text(content, "hardware", "")
        ordered = {} if self.problems else self.ordered(stages)
        if self.problems:
            raise ConfigError("\n".join(self.problems))
        # An included stage is there for those who need it.
        measured = {path.partition(".")[0] for metric in metrics.values() for path in metric.paths}
        made = Scale(recipe, name, self.file, title or "", numbers["seconds"], numbers["memory_gib"], hardware or "",
                     data, ordered, metrics, broken)  # fmt: skip
        kept = made.needed({*own, *measured})
        return Scale(**{**vars(made), "stages": {stage: ordered[stage] for stage in kept}})

    def included(self, names: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Stage]]:
        """Data, settings and stages of the included files; their stages take their own file's settings alone, so that
        they are the same stages for everyone who includes them."""
        data: dict[str, Any] = {}
        common: dict[str, Any] = {}
        stages: dict[str, Stage] = {}
        for name in [names] if isinstance(names, str) else names or []:
            file = (self.file.parent / str(name)).resolve()
            if not file.is_file():
                self.bad("include", f"no such file: {name}")
                continue
            content = self.mapping(yamlio.load(file), "the file", file)
            self.closed(content, _INCLUDED_KEYS, "", file)
            settings = self.mapping(content.get("settings"), "settings", file)
            data |= self.mapping(content.get("data"), "data", file)
            common = merged(common, settings)
            stages |= self.stages(self.mapping(content.get("stages"), "stages", file), settings, file)
        return data, common, stages

    def stages(self, content: dict[str, Any], common: dict[str, Any], file: Path) -> dict[str, Stage]:
        found = {name: self.stage(name, value, common, file) for name, value in content.items()}
        return {name: stage for name, stage in found.items() if stage is not None}

    def stage(self, name: str, value: Any, common: dict[str, Any], file: Path) -> Stage | None:
        at = f"stages.{name}"
        if not _NAME.fullmatch(name):
            self.bad(at, "a stage's name has small letters, digits, '-' and '_'", file)
            return None
        content = self.mapping(value, at, file)
        kinds = [kind for kind in KINDS if kind in content]
        if len(kinds) != 1:
            self.bad(at, f"needs one of {', '.join(KINDS)}" + (f", not {' and '.join(kinds)}" if kinds else ""), file)
            return None
        kind = kinds[0]
        more = {"run": ("with",), **dict.fromkeys(TRAINS, ("start",)), **dict.fromkeys(READS, ("on",))}[kind]
        self.closed(content, (kind, "needs", *more), at + ".", file)
        function = ""
        if kind == "run":
            function, settings = str(content["run"]), self.mapping(content.get("with"), f"{at}.with", file)
            self.function(function, at, file)
        else:
            settings = self.mapping(content[kind], f"{at}.{kind}", file)
            settings = merged(common, settings) if kind in TRAINS else settings
        start, on = content.get("start"), content.get("on")
        if kind in READS and on is None and not (kind == "evaluate" and "rm" in settings):
            self.bad(at, f"on: is missing, the stage whose run is {kind}d" + " (or rm:)" * (kind == "evaluate"), file)
        named = content.get("needs") or []
        if not isinstance(named, list):
            self.bad(f"{at}.needs", "expected a list of stages, [a, b]", file)
            named = []
        inside = [stage for what, stage in fields.fields(settings) if what in ("run", "model")]
        needs = dict.fromkeys(str(n) for n in (start, on, *named, *inside) if n is not None)
        return Stage(name, kind, settings, file, start, on, tuple(needs), function)

    def function(self, text: str, at: str, file: Path) -> None:
        code, colon, name = text.partition(":")
        if not colon or not name.isidentifier() or Path(code).name != code or not code.endswith(".py"):
            self.bad(f"{at}.run", f"'{text}': expected a function of a file of this folder, measures.py:name", file)
        elif not (file.parent / code).is_file():
            self.bad(f"{at}.run", f"no such file: {file.parent / code}", file)

    def references(self, stages: dict[str, Stage], data: dict[str, Any]) -> None:
        for name, stage in stages.items():
            at = f"stages.{name}"
            for other in stage.needs:
                if other not in stages:
                    self.bad(at, f"no such stage: {other} ({known_text(other, stages)})", stage.file)
            for role, whose in (("start", stage.start), ("on", stage.on)):
                if whose in stages and stages[whose].kind not in MODELS:
                    self.bad(f"{at}.{role}", f"stage {whose} makes no model", stage.file)
            self.fields(stage.settings, at, stages, data, stage.file)
        for key, value in data.items():
            sides = value if isinstance(value, dict) else {"file": value}
            if not sides or set(sides) - {"file", "hub"} or not all(isinstance(one, str) for one in sides.values()):
                self.bad(f"data.{key}", "expected a path or name, or {file: path, hub: name}")
            self.fields(value, f"data.{key}", {}, {}, self.file)

    def fields(self, value: Any, at: str, stages: dict[str, Stage], data: dict[str, Any], file: Path) -> None:
        for kind, name in fields.fields(value):
            shown = "{" + kind + (f".{name}" if name else "") + "}"
            if not fields.known(kind, name):
                said = " ".join("{" + one + "}" for one in (*fields.PLAIN, *(f"{two}.X" for two in fields.DOTTED)))
                self.bad(at, f"{shown}: known are {said}", file)
            elif kind == "data" and name not in data:
                self.bad(at, f"{shown}: data has no {name}", file)
            elif kind == "model" and name in stages and stages[name].kind not in MODELS:
                self.bad(at, f"{shown}: stage {name} makes no model", file)

    def metric(self, name: str, value: Any, stages: dict[str, Stage]) -> Metric | None:
        at = f"metrics.{name}"
        content = self.mapping(value, at)
        self.closed(content, _METRIC_KEYS, at + ".")
        for key in ("value", "minus", "over"):
            path = content.get(key)
            if path is None:
                if key == "value":
                    self.bad(at, "value: is missing, the path of a number: stage.key.key")
                continue
            stage, dot, rest = str(path).partition(".")
            if stage not in stages:
                self.bad(f"{at}.{key}", f"'{path}': no such stage: {stage} ({known_text(stage, stages)})")
            elif not dot or not rest:
                self.bad(f"{at}.{key}", f"'{path}': which number of stage {stage}? e.g. {stage}.after.eval_loss")
        if "value" not in content:
            return None
        if content.get("minus") is not None and content.get("over") is not None:
            self.bad(at, "minus and over: a metric is a difference or a ratio, not both")
        minus, published, over = (
            None if content.get(key) is None else str(content[key]) for key in ("minus", "published", "over")
        )
        chance = content.get("chance")
        if chance is not None and (isinstance(chance, bool) or not isinstance(chance, int | float)):
            self.bad(f"{at}.chance", f"is no number: {chance}")
            chance = None
        return Metric(name, str(content.get("say") or name), str(content["value"]), minus, published, over, chance)

    def wrong(self, name: str, value: Any, stages: dict[str, Stage], metrics: dict[str, Metric]) -> Broken | None:
        at = f"broken.{name}"
        content = self.mapping(value, at)
        self.closed(content, _BROKEN_KEYS, at + ".")
        stage, metric = str(content.get("stage")), str(content.get("metric"))
        settings = self.mapping(content.get("set"), f"{at}.set")
        before = len(self.problems)
        if stage not in stages:
            self.bad(f"{at}.stage", f"no such stage: {stage} ({known_text(stage, stages)})")
        if metric not in metrics:
            self.bad(f"{at}.metric", f"no such metric: {metric} ({known_text(metric, metrics)})")
        if not settings:
            self.bad(f"{at}.set", "is missing: the settings that are wrong")
        for kind, other in fields.fields(settings):
            if kind in ("run", "model") and other not in stages:
                self.bad(f"{at}.set", f"no such stage: {other}")
        if len(self.problems) > before:
            return None
        return Broken(name, str(content.get("say") or name), stage, settings, metric)

    def ordered(self, stages: dict[str, Stage]) -> dict[str, Stage]:
        """Each stage after those it needs, else in the file's order."""
        found: dict[str, Stage] = {}
        waiting = dict(stages)
        while waiting:
            ready = [name for name, stage in waiting.items() if all(need in found for need in stage.needs)]
            if not ready:
                self.bad("stages", f"need each other in a circle: {', '.join(waiting)}")
                return {}
            found[ready[0]] = waiting.pop(ready[0])
        return found

    # ------------------------------------------------------------------------------------------------------------
    # Values
    # ------------------------------------------------------------------------------------------------------------

    def mapping(self, value: Any, at: str, file: Path | None = None) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.bad(at, "expected keys and values", file)
            return {}
        return {str(key): item for key, item in value.items()}

    def closed(self, content: dict[str, Any], known: Iterable[str], at: str, file: Path | None = None) -> None:
        for key in content:
            if key not in known:
                self.bad(f"{at}{key}", f"unknown key ({known_text(key, known)})", file)

    def text(self, content: dict[str, Any], key: str, default: str | None) -> str | None:
        value = content.get(key, default)
        if value is not None and (not isinstance(value, str) or "\n" in value.strip()):
            self.bad(key, "expected one line of text")
            return default
        return value

    def number(self, content: dict[str, Any], key: str) -> float | None:
        value = content.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            self.bad(key, f"{value} (expected a number above 0, or null where nobody has measured it)")
            return None
        return value
