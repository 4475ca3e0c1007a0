"""The command line: ``alignlab <verb> [FILE.yaml | RUN_OR_FOLDER] [key=value ...]``.

Nothing heavy is imported before it is known that it is needed: ``--help`` must answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import json as json_module
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from alignlab import __version__
from alignlab.errors import AlignlabError, ConfigError
from alignlab.imports import collectable, importing
from alignlab.processes import StopFlag

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Read by the libraries when they are imported: no telemetry, and no remarks of theirs on the screen."""


class Verb(NamedTuple):
    """Where a verb lives, what it is for, what its configuration must hold, and what its first argument is."""

    path: str
    help: str
    beginner: bool = False
    needs: tuple[str, ...] = ()
    target: str = "config"
    """``config``: a YAML file or run folder to compose from; ``model``: a run or a model; ``words``: no composition"""
    own: tuple[str, ...] = ()
    """keys of the verb's own, which no configuration has"""
    flags: tuple[str, ...] = ()
    """those of them that may be written as flags: ``lint`` (``--lint``), ``write=PATH`` (``--write PATH``)"""
    forms: tuple[str, ...] = ()
    """what it is written like, one line a use, for ``--help``"""


ALL = ("model", "data", "objective")
LINT = ("benchmark", "ngram", "against", "similarity", "keep", "drop")
JUDGE = (
    "base_url", "api_key_env", "template", "condition", "temperature", "max_tokens", "extra", "concurrency",
    "max_retries", "timeout", "price_in", "price_out", "dry_run",
)  # fmt: skip
TASKS = ("include_path", "num_fewshot", "limit", "chat_template")
VERBS: dict[str, Verb] = {
    "train": Verb("alignlab.verbs.train:run", "train a model; the same command goes on where it stopped", True, ALL),
    "prepare": Verb("alignlab.verbs.prepare:run", "fetch and build everything train needs; no GPU", False, ALL),
    "inspect": Verb(
        "alignlab.verbs.inspect:run", "rows as the model sees them, targets marked; --lint: what is wrong with them",
        True, ALL, flags=("lint", "write=PATH"),
        own=("lint", "write", *(f"lint.{name}" for name in LINT)),
    ),
    "probe": Verb("alignlab.verbs.probe:run", "loss and gradient norms of the first step, no update", False, ALL),
    "verify": Verb(
        "alignlab.verbs.verify:run", "ways to train that must agree, tried on your rows: a matrix, exit 1 if one fails",
        False, ALL, own=("rows", "steps", "layers", "cells"),
    ),
    "validate": Verb(
        "alignlab.verbs.validate:run",
        "what is wrong with a configuration, without training; dry_run=true: two small steps",
        False, ALL, own=("dry_run",),
    ),
    "show": Verb("alignlab.verbs.show:run", "options, keys, and the composed configuration with who set what", True),
    "evaluate": Verb(
        "alignlab.verbs.evaluate:run",
        "loss, accuracy, verifier on held-out rows; a reward model: evaluate rm=MODEL data=ROWS",
        True, (), "model", own=(
            "rm", "against", "plot", "resamples", "alone", "control", "prompts", "front", "score", "best_of",
            "temperature", "measure", "judge", *(f"judge.{name}" for name in JUDGE),
            "tasks", *(f"tasks.{name}" for name in TASKS),
        ),
        forms=(
            "evaluate RUN [data=ROWS]                         loss, accuracy, a verifier's figures",
            "evaluate rm=MODEL data=ROWS [against=MODEL]      a reward model (docs/reward-models.md)",
            "evaluate RUN control=true [prompts=50]           what a request moves, cpsft and cpo (docs/control.md)",
            "evaluate RUN best_of=8 score=MODEL               re-ranking of sampled answers",
            "evaluate RUN_OR_FILE judge=NAME [against=OTHER]  a judge behind a chat endpoint (docs/evaluation.md)",
            "evaluate RUN tasks=gsm8k,arc_easy                benchmarks of the lm-eval harness (docs/evaluation.md)",
        ),
    ),
    "sample": Verb(
        "alignlab.verbs.sample:run", "answers of a run or model, generated in batches", True, (), "model", forms=(
            "sample RUN eval.prompt='...'",
            "sample RUN data=ROWS [eval.generate=20] [eval.temperature=0.7 eval.num_samples=4] [eval.backend=vllm]",
        ),
    ),
    "chat": Verb(
        "alignlab.verbs.chat:run", "talk with a run or a model in the terminal", False, (), "model",
        own=("system", "condition"),
    ),
    "export": Verb("alignlab.verbs.export:run", "a run as a plain Hugging Face folder", True, (), "model"),
    "ledger": Verb(
        "alignlab.verbs.ledger:run", "what a run saw: ledger RUN [step=N | sample=ID | other=RUN]", False, (), "words"
    ),
    "diff": Verb(
        "alignlab.verbs.diff:run", "what two runs differ in, and where their numbers part: diff RUN_A RUN_B",
        False, (), "words",
    ),
    "loop": Verb(
        "alignlab.verbs.loop:run", "rounds of sample, score, pair, train: preferences among the policy's own answers",
        False, ALL, own=(
            "rounds", "prompts", "samples", "temperature", "scorer", "measure", "own_answer", "threshold",
            "policy_init", "reference", "data_window", "held_out",
        ),
    ),
    "reproduce": Verb(
        "alignlab.verbs.reproduce:run", "a recipe's stages and a verdict: reproduce RECIPE|all [scale=toy|small|paper]",
        False, (), "words", own=(
            "scale", "seed", "rows", "workers", "output_dir", "only", "calibrate", "broken", "execute", "dry_run",
            "set.<stage>.<key>",
        ),
    ),
    "report": Verb(
        "alignlab.verbs.report:run", "the page of a run: curves, how to read them, the pairs most probably mislabelled",
        False, (), own=("suspects",),
    ),
    "env": Verb("alignlab.verbs.env:run", "versions, devices, cache", False, (), "words"),
    "cache": Verb("alignlab.verbs.cache:run", "what is cached: cache ls | cache rm KIND [KEY]", False, (), "words"),
    "ls": Verb(
        "alignlab.verbs.ls:run", "runs in a folder and how they stand; ls recipes: what can be reproduced", False, (),
        "words",
    ),
}  # fmt: skip


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


@dataclass
class _Arguments:
    verb: str = ""
    words: list[str] = field(default_factory=list)
    json: bool | Path = False
    sweep: bool = False
    help: str = ""


def emit(request: Request, result: dict[str, Any]) -> None:
    """Under ``--json``: ``result`` as one JSON object on standard output, or in the file named; else nothing."""
    if request.json is False:
        return
    text = json_module.dumps(result, ensure_ascii=False, allow_nan=False, default=_plain)
    if isinstance(request.json, Path):
        request.json.parent.mkdir(parents=True, exist_ok=True)
        request.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text, file=request.stdout, flush=True)


def _plain(value: Any) -> Any:
    from alignlab.configuration.schema import plain

    found = plain(value)
    return found if found is not value else str(value)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.  Errors are one line each on standard error."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    words = sys.argv[1:] if argv is None else argv
    arguments = _Arguments()
    stdout = sys.stdout
    try:
        arguments = _parse(words)
        if arguments.help:
            print(_help_text(arguments.help))
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
    arguments = _Arguments(verb=_verb(verb), words=[target] if target is not None else [])
    return _dispatch(arguments, sys.stdout, settings)


def load(verb: str) -> Any:
    """The function behind a verb."""
    module, _, name = VERBS[verb].path.partition(":")
    with importing():
        return getattr(import_module(module), name)


def _dispatch(arguments: _Arguments, stdout: TextIO, settings: dict[str, Any] | None = None) -> int:
    verb = VERBS[arguments.verb]
    if verb.target == "words":
        request = Request(arguments.verb, json=arguments.json, words=arguments.words, stdout=stdout)
        request.settings = dict(settings or {})
        with collectable():
            return load(arguments.verb)(request)
    # Composing takes seconds; a signal that comes meanwhile must find someone who remembers it.
    with StopFlag().installed() if arguments.verb == "train" else contextlib.nullcontext(), collectable():
        return _composed(arguments, stdout, settings)


def _composed(arguments: _Arguments, stdout: TextIO, settings: dict[str, Any] | None) -> int:
    verb, words, compose = arguments.verb, arguments.words, not arguments.sweep
    with importing():  # composing reads the objectives, and so imports torch
        request = make_request(verb, words, settings, json=arguments.json, compose=compose)
    request.stdout = stdout
    if arguments.sweep:
        from alignlab.launching.sweep import sweep

        return sweep(request)
    return load(arguments.verb)(request)


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
        compose_request(request)
    return request


def compose_request(request: Request) -> None:
    """Fill in the configuration."""
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


# ---------------------------------------------------------------------------------------------------------------
# Arguments, help, errors
# ---------------------------------------------------------------------------------------------------------------


def _parse(words: list[str]) -> _Arguments:
    found = _Arguments()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            found.help = found.verb or "beginner"
        elif word == "--help-all":
            found.help = "all"
        elif word == "--version":
            found.help = "version"
        elif word == "--json":
            found.json = Path(rest.pop(0)) if rest and rest[0].endswith(".json") and "=" not in rest[0] else True
        elif word.startswith("--json="):
            found.json = Path(word[7:])
        elif word in ("-m", "--multirun"):
            found.sweep = True
        elif not found.verb:
            found.verb = _verb(word)
        else:
            found.words.append(word)
    if not found.verb and not found.help:
        found.help = "beginner"
    found.words = _flags(found)
    return found


def _flags(found: _Arguments) -> list[str]:
    """The words, the verb's own flags as settings: ``--lint`` is ``lint=true``, ``--write PATH`` is ``write=PATH``."""
    flags = VERBS[found.verb].flags if found.verb else ()
    takes = {flag.partition("=")[0]: "=" in flag for flag in flags}
    made, rest = [], list(found.words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or name not in takes:
            made.append(word)
            continue
        if takes[name] and not equals:
            if not rest or rest[0].startswith("-"):
                raise ConfigError(f"--{name} needs a path: --{name} PATH")
            value = rest.pop(0)
        made.append(f"{name}={value or 'true'}")
    return made


def _verb(word: str) -> str:
    if word in VERBS:
        return word
    if "=" in word:
        raise ConfigError(f"a verb comes first: alignlab train {word} ...")
    near = difflib.get_close_matches(word, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
    raise ConfigError(f"unknown verb '{word}': {hint}")


def _help_text(which: str) -> str:
    if which == "version":
        return f"alignlab {__version__}"
    if which in VERBS:
        target = {"config": "[FILE.yaml | RUN]", "model": "RUN_OR_MODEL", "words": "..."}[VERBS[which].target]
        flags = "".join(f" [--{flag.replace('=', ' ')}]" for flag in VERBS[which].flags)
        own = f"Its own keys: {' '.join(VERBS[which].own)}\n" if VERBS[which].own else ""
        forms = "".join(f"  alignlab {form}\n" for form in VERBS[which].forms) + "\n" * bool(VERBS[which].forms)
        about = f"{VERBS[which].help}\n\n{forms}{own}All keys: alignlab show"
        return f"alignlab {which} {target}{flags} [key=value ...]\n\n{about}"
    lines = ["alignlab <verb> [FILE.yaml | RUN_OR_FOLDER] [key=value ...] [-m] [--json [PATH.json]]", ""]
    for name, verb in VERBS.items():
        if verb.beginner or which == "all":
            lines.append(f"  {name:<10} {verb.help}")
    if which != "all":
        lines += ["", "e.g. alignlab train objective=dpo model=tiny data=sums", "More verbs: alignlab --help-all"]
    else:
        lines += [
            "",
            "  -m             every combination of comma lists and range() in the settings, one launch each (train)",
            "  --json [PATH]  one JSON object on standard output, or in PATH.json",
            "",
            "Exit codes: 0 done, 1 a check said no, 2 config or data, 3 numerics, 4 storage, 5 hang or lost rank,",
            "            6 folder busy, 7 out of memory, 70 our bug, 75 preempted",
        ]
    return "\n".join(lines)


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
        with contextlib.suppress(OSError):
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
