"""``alignlab show``: groups and keys; with settings, the composed configuration and who set each key."""

from __future__ import annotations

import dataclasses
from typing import Any

from alignlab.config import RootConfig
from alignlab.configuration import keys, names, schema, yamlio
from alignlab.configuration.compose import missing
from alignlab.configuration.frozen import frozen_text
from alignlab.configuration.groups import conf_folder, options
from alignlab.configuration.settings import GROUPS
from alignlab.errors import ConfigError
from alignlab.registry import OBJECTIVES, unknown_name
from alignlab.request import Request, emit


def run(request: Request) -> int:
    """Without arguments the groups; with a group's name its options and keys; else the composed configuration.

    Of a run's folder also which keys the run has read.
    """
    if request.target is not None and request.file is None:
        return _group(request, request.target)
    if not request.overrides and not request.settings and request.file is None:
        return _overview(request)
    return _composed(request)


def _composed(request: Request) -> int:
    absent = missing(request.config, ("model", "data", "objective"))
    name = None if absent else names.run_name(request.config)
    if name is not None:
        print(f"# run {name}")
    for line in absent:
        print(f"# {line}")
    record = keys.recorded(request.file) if request.file is not None and not request.overrides else {}
    read = {key: entry["read"] for key, entry in record.items()}
    if read:
        told = {key: f"{who}, {'read' if read.get(key) else 'not read'}" for key, who in request.provenance.items()}
        print(yamlio.dump(schema.flatten(request.config), told), end="")
    else:
        print(frozen_text(request.config, request.provenance), end="")
    emit(
        request,
        {
            "name": name,
            "config": schema.flatten(request.config),
            "provenance": request.provenance,
            "stated": sorted(request.stated),
            "read": read,
            "options": request.options,
            "missing": absent,
        },
    )
    return 0


def _overview(request: Request) -> int:
    print("groups, chosen with group=option (alignlab show GROUP lists keys; alignlab show key=value ... composes)")
    for group in GROUPS:
        more = " | a path | a hub name" if group in ("model", "data") else ""
        print(f"  {group:<10} {' '.join(options(group))}{more}")
    print("other keys")
    others = [key for key in schema.schema(None) if key.split(".")[0] not in GROUPS]
    print("  " + " ".join(others))
    emit(request, {"groups": {group: list(options(group)) for group in GROUPS}, "keys": list(schema.schema(None))})
    return 0


def _group(request: Request, group: str) -> int:
    if group not in GROUPS:
        raise ConfigError(unknown_name("group", group, list(GROUPS)))
    print(f"{group}: {' '.join(options(group))}")
    for option in options(group):
        for line in _about(group, option):
            print(f"  {option:<12} {line}")
    if group == "objective":
        for name in OBJECTIVES.names():
            print(f"\nobjective={name}")
            _keys(schema.objective_config(name), "objective")
    else:
        section = next((f for f in dataclasses.fields(RootConfig) if f.name == group), None)
        if section is not None and section.default_factory is not dataclasses.MISSING:
            print()
            _keys(type(section.default_factory()), group)
    emit(request, {"group": group, "options": list(options(group))})
    return 0


def _about(group: str, option: str) -> list[str]:
    path = conf_folder() / group / f"{option}.yaml"
    if not path.exists():
        return ["registered from outside"]
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line[2:] for line in lines if line.startswith("# ") and "@package" not in line][:1]


def _keys(section: type, prefix: str) -> None:
    notes: dict[str, str] = schema.documentation(section)
    for field in dataclasses.fields(section):
        default: Any = schema._default(field)
        if dataclasses.is_dataclass(default):
            _keys(type(default), f"{prefix}.{field.name}")
            continue
        shown = yamlio.scalar(schema.plain(default))
        print(f"  {prefix}.{field.name} = {shown}")
        if field.name in notes:
            print(f"      {notes[field.name].replace('``', '')}")
