"""What a verb is asked to do: its arguments, the configuration composed from them, and where its answer goes."""

from __future__ import annotations

import json as json_module
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from alignlab.durable import write_named
from alignlab.errors import ConfigError
from alignlab.verb_table import VERBS


@dataclass
class Request:
    """What a verb is asked to do: ``run(request) -> exit code``."""

    verb: str
    config: Any = None
    """RootConfig, checked; None for verbs that compose nothing"""
    target: str | None = None
    """the first argument as typed: a YAML file, a run folder, a model folder or a hub name"""
    json: bool | Path = False
    provenance: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    """the ``key=value`` arguments as typed"""
    words: list[str] = field(default_factory=list)
    """all arguments of verbs that compose nothing"""
    file: Path | None = None
    """the YAML file that was composed"""
    settings: dict[str, Any] = field(default_factory=dict)
    """Python values given to :func:`alignlab.run`"""
    own: dict[str, Any] = field(default_factory=dict)
    """the verb's own keys that were set: text from the command line, values from Python"""
    options: dict[str, str | None] = field(default_factory=dict)
    plugins: list[Any] = field(default_factory=list)
    stated: frozenset[str] = frozenset()
    """the keys that the user or a recipe set"""
    reads: set[str] = field(default_factory=set)
    """the keys read so far, where the configuration is watched (:mod:`alignlab.configuration.watch`)"""
    stdout: TextIO = field(default_factory=lambda: sys.stdout)


def make_request(
    verb: str,
    words: list[str],
    settings: dict[str, Any] | None = None,
    *,
    json: bool | Path = False,
    compose: bool = True,
) -> Request:
    """The request that the arguments of a composing verb stand for."""
    target, tokens = _target(verb, words)
    own = {key: text for key, _, text in (t.partition("=") for t in tokens) if key in VERBS[verb].own}
    tokens = [token for token in tokens if token.partition("=")[0] not in own]
    given = dict(settings or {})
    own |= {key: given.pop(key) for key in VERBS[verb].own if key in given}
    request = Request(verb, target=target, json=json, overrides=tokens, settings=given, own=own)
    if target is not None:
        request.file = _composed_from(verb, target)
        if VERBS[verb].target == "model" and request.file is None:
            request.settings.setdefault("model.name_or_path", target)
    if compose:
        _compose(request)
    return request


def _compose(request: Request) -> None:
    """Fill in the configuration, and who set what in it."""
    from alignlab.configuration.compose import compose

    lints = request.verb == "inspect" and request.own  # rows alone can be looked at
    needs = ("data",) if lints else VERBS[request.verb].needs
    composed = compose(
        request.overrides, file=request.file, values=request.settings, needs=needs, own=VERBS[request.verb].own
    )
    request.config, request.provenance = composed.config, composed.provenance
    request.options, request.plugins = composed.options, composed.plugins
    request.stated = composed.stated


def _target(verb: str, words: list[str]) -> tuple[str | None, list[str]]:
    """The first argument that is no setting, and the settings."""
    targets: list[str] = []
    tokens: list[str] = []
    for word in words:
        is_token = word.startswith("-") or ("=" in word and not _is_path(word))
        (tokens if is_token else targets).append(word)
    if any(token.startswith("-") for token in tokens):
        from alignlab.configuration.settings import from_tokens

        problems: list[str] = []
        from_tokens(tokens, problems)
        raise ConfigError("\n".join(problems))
    if len(targets) > 1:
        raise ConfigError(f"{verb} takes one file or folder, not {len(targets)}: {' '.join(targets)}; quote spaces")
    return (targets[0] if targets else None), tokens


def _is_path(word: str) -> bool:
    """Whether ``a=b/run.yaml`` is a file: no section is called ``a``, and it is there."""
    from alignlab.configuration.schema import schema
    from alignlab.configuration.settings import GROUPS

    section = word.partition("=")[0].partition(".")[0]
    known = {*GROUPS, *(key.partition(".")[0] for key in schema(None))}
    return section not in known and Path(word).exists()


def _composed_from(verb: str, target: str) -> Path | None:
    """The YAML file a target stands for; None where the target is a model or a name."""
    path = Path(os.path.expanduser(target))
    if (path / "run.yaml").is_file():
        return path / "run.yaml"
    if VERBS[verb].target == "model":
        if path.name == "model" and (path.parent / "run.yaml").is_file():
            return path.parent / "run.yaml"
        if not path.exists() and (target.startswith(("/", "./", "../", "~/", "runs/"))):
            raise ConfigError(f"{verb}: no such run or model: {target}")
        return None
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{verb}: {target} holds no run.yaml")
    if verb == "show":
        return None
    raise ConfigError(f"{verb}: no such file: {target} (settings are written key=value)")


def emit(request: Request, result: dict[str, Any]) -> None:
    """Under ``--json``: ``result`` as one JSON object on standard output, or in the file named; else nothing."""
    if request.json is False:
        return
    text = json_module.dumps(result, ensure_ascii=False, allow_nan=False, default=_plain)
    if isinstance(request.json, Path):
        write_named("--json", request.json, text + "\n")
    else:
        print(text, file=request.stdout, flush=True)


def _plain(value: Any) -> Any:
    from alignlab.configuration.schema import plain

    found = plain(value)
    return found if found is not value else str(value)
