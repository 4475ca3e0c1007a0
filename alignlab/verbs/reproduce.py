"""``alignlab reproduce RECIPE|all``: a recipe's stages in order, and a verdict: its figures against their bands."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignlab.configuration import names
from alignlab.configuration.yamlio import parse
from alignlab.durable import write_atomic
from alignlab.errors import AlignlabError, ConfigError
from alignlab.processes import StopFlag
from alignlab.recipes import bands, shelf
from alignlab.recipes.carry_out import Calibration, Outcome, calibrate, carry_out, verdict
from alignlab.recipes.on_paper import print_commands, try_out
from alignlab.recipes.plan import Case
from alignlab.recipes.reading import read
from alignlab.recipes.scale import Scale
from alignlab.recipes.verdict import Verdict, figure, markdown, text
from alignlab.request import Request, emit
from alignlab.verbs.options import own_options

LISTS = ("calibrate", "only")
CHANGE = "set."


@dataclass
class Options:
    """The verb's own settings."""

    scale: str = "toy"
    """toy | small | paper"""
    seed: int = 0
    rows: str | None = None
    """The folder of row files, where the recipe's stages read some."""
    workers: int = 2
    """Stages at once."""
    output_dir: str = "reproductions"
    only: list[str] = field(default_factory=list)
    """Stages; what they need is done too."""
    calibrate: list[int] = field(default_factory=list)
    """Seeds that the bands are measured with; ``expected.json`` is written."""
    broken: str | None = None
    """A setting that is wrong on purpose, by its name in the recipe, or ``all``: its metric must fall outside."""
    execute: bool = False
    """Do the stages of ``scale=paper``, which are only printed otherwise."""
    dry_run: bool = False
    """Check every training stage, with two steps of a model that is cut down; nothing is trained."""


def run(request: Request) -> int:
    """1 where a figure is outside its band, or a wrong setting is not noticed; 0 where all is well or has no band."""
    recipes, options, changes = _asked(request)
    scales = _scales(recipes, options)
    home = Path(os.path.expanduser(options.output_dir)).absolute() / options.scale
    rows = None if options.rows is None else _rows(options.rows)
    cases = [case for scale in scales for case in _cases(scale, options, changes, rows)]
    if options.dry_run:
        return try_out(request, cases, home)
    if options.scale == "paper" and not options.execute:
        return print_commands(request, cases, home)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.workers)))
    begun = time.monotonic()
    names_of = [f"{scale.recipe}/{stage}" for scale in scales for stage in scale.stages]
    width = max(map(len, names_of)) + len(" seed 1") * bool(options.calibrate)

    def say(name: str, what: str, seconds: float) -> None:
        print(f"stage    {name:<{width}}  {f'{seconds:.0f} s' if what == 'done' else what}", flush=True)

    print(f"recipe   {', '.join(scale.recipe for scale in scales)}   scale={options.scale}   -> {home}", flush=True)
    with StopFlag().installed() as stop:
        outcomes = carry_out(cases, home, options.workers, stop, say)
    unit = 2**20 if sys.platform == "linux" else 2**30
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
    at_once = "one stage after the other" if options.workers == 1 else f"{options.workers} stages at once"
    print(f"cost     {time.monotonic() - begun:.0f} s, {at_once}, {peak:.1f} GiB at most in one")
    if options.calibrate:
        return _bands(request, scales, outcomes, options)
    verdicts = [verdict(outcome, home) for outcome in outcomes]
    for case, one in zip(cases, verdicts, strict=True):
        _write(_place(case, home), "verdict", [one])
    if len(verdicts) > 1:
        _write(home, "broken" if options.broken else "verdict", verdicts)
    print(text(verdicts))
    emit(request, {"path": str(home), "verdicts": [one.as_json() for one in verdicts]})
    failed = next((one.exit_code for one in verdicts if one.error), 0)
    return failed or int(not all(one.passed for one in verdicts))


def _bands(request: Request, scales: list[Scale], outcomes: list[Outcome], options: Options) -> int:
    """Write the bands of every recipe whose stages are all done; then raise what kept another one from it."""
    entries, failed = {}, None
    for scale in scales:
        try:
            made = calibrate(scale, [one for one in outcomes if one.case.scale is scale], options.workers)
        except AlignlabError as error:
            failed = failed or error
            continue
        path = bands.write(scale.folder, scale.name, made.entry)
        _say_calibrated(made)
        print(f"written  {path}")
        entries[scale.recipe] = made.entry
    if failed is not None:
        raise failed
    emit(request, entries)
    return 0


def _asked(request: Request) -> tuple[list[str], Options, dict[str, dict[str, Any]]]:
    """Recipes, options, and changes by stage, out of words and Python values."""
    recipes: list[str] = []
    given: dict[str, Any] = {}
    for word in request.words:
        key, equals, value = word.partition("=")
        if not equals:
            recipes.append(word)
        else:
            given[key] = f"[{value}]" if key in LISTS and not value.startswith("[") else value
    given |= request.settings
    changes: dict[str, dict[str, Any]] = {}
    for word in [key for key in given if key.startswith(CHANGE)]:
        stage, dot, key = word.removeprefix(CHANGE).partition(".")
        if not dot:
            raise ConfigError(f"{word}: written {CHANGE}<stage>.<key>=value")
        value = given.pop(word)
        changes.setdefault(stage, {})[key] = _value(value) if isinstance(value, str) else value
    unknown = [key for key in given if key not in Options.__dataclass_fields__]
    if unknown:
        raise ConfigError(
            f"unknown key '{unknown[0]}': reproduce takes {', '.join(Options.__dataclass_fields__)}, and "
            f"{CHANGE}<stage>.<key> for a key of a stage"
        )
    options = own_options(replace(request, own=given), Options)
    if options.workers < 1:
        raise ConfigError(f"workers={options.workers}: at least 1")
    if options.calibrate:
        _check_calibration(options, changes)
    return recipes, options, changes


def _check_calibration(options: Options, changes: Mapping[str, Any]) -> None:
    for what, given in (("only=", options.only), ("broken=", options.broken), (CHANGE, changes)):
        if given:
            raise ConfigError(f"calibrate= measures the recipe as it stands; leave {what} out")
    if len(set(options.calibrate)) < max(bands.LEAST, len(options.calibrate)):
        raise ConfigError(f"calibrate={options.calibrate}: at least {bands.LEAST} different seeds")


def _value(text: str) -> Any:
    """A number, a truth value or a list is what it looks like; anything else is text."""
    try:
        return parse(text, text)
    except ConfigError:
        return text


def _scales(recipes: list[str], options: Options) -> list[Scale]:
    if not recipes:
        raise ConfigError(f"reproduce: which recipe? {', '.join(shelf.names()) or 'none is here'}, or all")
    if "all" in recipes:
        if options.scale not in shelf.SCALES:
            raise ConfigError(f"scale={options.scale}: known are {', '.join(shelf.SCALES)}")
        folders = [folder for name in shelf.names() if options.scale in shelf.scales(folder := shelf.find(name))]
    else:
        folders = [shelf.find(name) for name in dict.fromkeys(recipes)]
    return [read(folder, options.scale) for folder in folders]


def _rows(text: str) -> Path:
    path = Path(os.path.expanduser(text))
    if not path.is_dir():
        raise ConfigError(f"rows={text}: no such folder")
    return path.absolute()


def _cases(
    scale: Scale, options: Options, changes: Mapping[str, Mapping[str, Any]], rows: Path | None
) -> Iterable[Case]:
    if options.calibrate:
        yield from (Case(scale, seed, rows) for seed in options.calibrate)
        yield from (Case(scale, options.calibrate[0], rows, broken=name) for name in scale.broken)
    elif options.broken:
        wanted = list(scale.broken) if options.broken == "all" else [options.broken]
        for name in wanted:
            if name not in scale.broken:
                known = ", ".join(scale.broken) or "none"
                raise ConfigError(f"broken={name}: {scale.recipe} has no such wrong setting at this scale ({known})")
            yield Case(scale, options.seed, rows, changes, name)
    else:
        yield Case(scale, options.seed, rows, changes, None, tuple(options.only))


def _place(case: Case, home: Path) -> Path:
    """Where a case's verdict goes; one of changed settings beside that of the recipe as it stands."""
    name = f"seed-{case.seed}"
    if case.changes or case.only:
        name += f"-{names.digest({'changes': case.changes, 'only': case.only})[:8]}"
    return home / case.scale.recipe / (f"{name}-{case.broken}" if case.broken else name)


def _write(folder: Path, name: str, verdicts: list[Verdict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.md", markdown(verdicts))
    content = [one.as_json() for one in verdicts] if len(verdicts) > 1 else verdicts[0].as_json()
    write_atomic(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _say_calibrated(made: Calibration) -> None:
    scale, entry = made.scale, made.entry
    print(f"bands    {scale.recipe} scale={scale.name}: 99 % for one more run, {len(entry['seeds'])} seeds")
    for name, one in entry["metrics"].items():
        values = " ".join(map(figure, one["values"]))
        band = "{:.4g} to {:.4g}".format(*one["band"]) if "band" in one else "not judged"
        print(f"  {name:<28} {band}   mean {figure(one['mean'])} of {values}")
    for name, one in entry["broken"].items():
        print(f"  broken '{name}': {one['metric']} {figure(one['value'])}")
    for name, one in entry["metrics"].items():
        if "no_band" in one:
            print(f"no band  {scale.recipe} {name}: {one['no_band']}")
    for name, unnoticed in made.unnoticed.items():
        for what in unnoticed:
            print(f"warning  {scale.recipe} {name}: {what}")
