"""What a result was obtained under (settings, rows, templates, versions, machine), and in what two of them differ."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignlab.configuration import names
from alignlab.configuration.schema import differing
from alignlab.configuration.yamlio import brief, scalar
from alignlab.recipes.plan import Planned, stated
from alignlab.recipes.work import manifests
from alignlab.verbs.env import collect, gpus

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "deepspeed", "gymnasium")
"""Of the installed packages those that a figure can depend on."""


def versions() -> dict[str, Any]:
    """Of alignlab, Python and the packages."""
    found = collect()
    kept = {name: version for name, version in found["packages"].items() if name in PACKAGES}
    return {"alignlab": found["alignlab"], "commit": found["commit"], "python": found["python"], **kept}


def machine() -> dict[str, Any]:
    """Cores, processor and, where there are any, GPUs."""
    found = gpus()
    return {"cores": os.cpu_count(), "processor": _processor(), **({"gpus": found} if found else {})}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def settings(stages: Mapping[str, Planned]) -> dict[str, dict[str, Any]]:
    """By stage, every key of its inputs; what all of them share stands once, under ``*``."""
    inputs = {name: one.inputs for name, one in stages.items()}
    composed = [one for name, one in inputs.items() if stages[name].request is not None]
    first = composed[0] if composed else {}
    shared = {key: value for key, value in first.items() if all(key in o and o[key] == value for o in composed)}
    found = {"*": shared}
    for name, one in inputs.items():
        own = stages[name].request is not None
        found[name] = {key: value for key, value in one.items() if not (own and key in shared)}
    return found


def data(stages: Mapping[str, Planned]) -> dict[str, dict[str, str]]:
    """By training stage and side, the hash of the rows as tokens."""
    found = {}
    for name, one in stages.items():
        sides = {side: account["index"][:16] for side, account in manifests(one).items() if "index" in account}
        if sides:
            found[name] = sides
    return found


def templates(stages: Mapping[str, Planned]) -> dict[str, str]:
    """By training stage, the hash of the template its rows were rendered with."""
    found = {name: manifests(one).get("train", {}).get("template") for name, one in stages.items()}
    return {name: str(text) for name, text in found.items() if text}


def of_stages(stages: Mapping[str, Planned]) -> dict[str, Any]:
    """What is recorded of one seed's stages, beside the versions."""
    found = settings(stages)
    return {"settings": found, "settings_hash": names.digest(found)[:16], "templates": templates(stages)}


def differences(
    recorded: Mapping[str, Any], now: Mapping[str, Any], seed: int, rows: Mapping[str, Any]
) -> Iterator[str]:
    """What differs from ``recorded`` (an entry of ``expected.json``), one text each, the most telling first.

    ``now``: :func:`of_stages`, composed with a recorded seed; ``rows``: :func:`data` of this run, compared with those
    of its ``seed``, or where that has no record with those that are the same for all seeds.
    """
    yield from _of_settings(recorded.get("settings", {}), now["settings"])
    for stage, sides in rows.items():
        for side, is_now in sides.items():
            known = _rows_of(recorded, seed, stage, side)
            if known is not None and known != is_now:
                yield f"data of {stage} ({side}) {known} -> {is_now}"
    for stage, is_now in now["templates"].items():
        known = recorded.get("templates", {}).get(stage)
        if known != is_now:
            yield f"template of {stage} {known} -> {is_now}"


def other_versions(recorded: Mapping[str, Any], versions: Iterable[Mapping[str, Any]]) -> list[str]:
    """In which versions those that the stages were done with differ from the recorded ones."""
    found = [
        f"{name} {was} -> {is_now}"
        for one in versions
        for name, (was, is_now) in differing(recorded.get("versions", {}), one).items()
    ]
    return list(dict.fromkeys(found))


def seeds_without(recorded: Mapping[str, Any], seed: int, rows: Mapping[str, Any]) -> bool:
    """Whether rows of this run have no record to be compared with."""
    return any(_rows_of(recorded, seed, stage, side) is None for stage, sides in rows.items() for side in sides)


def _rows_of(recorded: Mapping[str, Any], seed: int, stage: str, side: str) -> str | None:
    """The recorded hash of a stage's rows; None where they depend on the seed and it has no record."""
    by_seed = {number: found.get(stage, {}).get(side) for number, found in recorded.get("data", {}).items()}
    if str(seed) in by_seed:
        return by_seed[str(seed)]
    same = set(by_seed.values())
    return same.pop() if len(same) == 1 else None


def _of_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    stages: dict[str, list[str]] = {}
    for name in now:
        if name == "*":
            continue
        if name not in before:
            yield f"stage {name} is new"
            continue
        composed = not {"on", "code"} & set(now[name])  # what trainings share stands under "*", and is theirs alone
        was, is_now = ({**(found.get("*", {}) if composed else {}), **found[name]} for found in (before, now))
        said = stated(is_now) if composed else is_now
        for key, (old, new) in differing(was, is_now).items():
            if key in was or key in said:  # a key that alignlab has got since, and nobody set, is no difference
                stages.setdefault(f"{key} {brief(scalar(old))} -> {brief(scalar(new))}", []).append(name)
    yield from (f"{text} ({', '.join(names)})" for text, names in stages.items())
    yield from (f"stage {name} is gone" for name in before if name not in now)
