"""Run one command: ``alignlab <verb> [FILE.yaml | RUN_OR_FOLDER] [key=value ...]``, its outcome as an exit code.

Nothing heavy is imported before it is known that it is needed: ``--help`` must answer at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from alignlab.arguments import Arguments, help_text, parse, verb_named
from alignlab.errors import AlignlabError, StorageError
from alignlab.imports import collectable, importing
from alignlab.processes import StopFlag
from alignlab.request import Request, emit, make_request
from alignlab.verb_table import VERBS

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Read by the libraries when they are imported: no telemetry, and no remarks of theirs on the screen."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.  Errors are one line each on standard error."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    words = sys.argv[1:] if argv is None else argv
    arguments = Arguments()
    stdout = sys.stdout
    try:
        arguments = parse(words)
        if arguments.help:
            print(help_text(arguments.help))
            return 0
        with _chatter_to_stderr(arguments.json is True):
            return _dispatch(arguments, stdout)
    except AlignlabError as error:
        return _fail(error, error.exit_code, arguments.json, stdout)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return 0
    except Exception as error:
        place = _write_traceback(words)
        line = f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:200]} (traceback: {place})"
        return _fail(AlignlabError(line), 70, arguments.json, stdout)


def call(verb: str, target: str | None, settings: dict[str, Any]) -> int:
    """:func:`alignlab.run`: like :func:`main`, but with Python values, and errors are raised."""
    arguments = Arguments(verb=verb_named(verb), words=[target] if target is not None else [])
    return _dispatch(arguments, sys.stdout, settings)


def load(verb: str) -> Any:
    """The function behind a verb."""
    module, _, name = VERBS[verb].path.partition(":")
    with importing():
        return getattr(import_module(module), name)


def _dispatch(arguments: Arguments, stdout: TextIO, settings: dict[str, Any] | None = None) -> int:
    verb = VERBS[arguments.verb]
    if verb.target == "words":
        request = Request(arguments.verb, json=arguments.json, words=arguments.words, stdout=stdout)
        request.settings = dict(settings or {})
        with collectable():
            return load(arguments.verb)(request)
    # Composing takes seconds; a signal that comes meanwhile must find someone who remembers it.
    with StopFlag().installed() if arguments.verb == "train" else contextlib.nullcontext(), collectable():
        return _composed(arguments, stdout, settings)


def _composed(arguments: Arguments, stdout: TextIO, settings: dict[str, Any] | None) -> int:
    verb, words, compose = arguments.verb, arguments.words, not arguments.sweep
    with importing():  # composing reads the objectives, and so imports torch
        request = make_request(verb, words, settings, json=arguments.json, compose=compose)
    request.stdout = stdout
    if arguments.sweep:
        from alignlab.launching.sweep import sweep

        return sweep(request)
    return load(arguments.verb)(request)


@contextlib.contextmanager
def _chatter_to_stderr(active: bool) -> Iterator[None]:
    """Keep standard output free for one JSON object."""
    if not active:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _fail(error: AlignlabError, code: int, json: bool | Path, stdout: TextIO) -> int:
    from alignlab.configuration.checks import redact

    text = redact(str(error))
    if code == 2 and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        return code  # every rank composes and meets the same problem; rank 0 says it
    for line in text.splitlines() or [type(error).__name__]:
        print(f"alignlab: {line}", file=sys.stderr)
    if json is not False:
        with contextlib.suppress(OSError, StorageError):  # said above; the place for the answer is no second error
            emit(Request("", json=json, stdout=stdout), {"error": text, "exit_code": code})
    return code


def _write_traceback(words: list[str]) -> str:
    from alignlab.configuration.checks import redact
    from alignlab.data import cache

    text = redact(f"alignlab {' '.join(words)}\n\n{traceback.format_exc()}")
    place = cache.root() / "crashes" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    except OSError:
        print(text, file=sys.stderr)
        return "above"
    return str(place)
