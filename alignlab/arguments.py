"""A command line as typed: its verb, its flags and the words in between, and the text that ``--help`` answers.

Nothing here knows what a configuration is; what the words mean is :mod:`alignlab.request`'s business.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from alignlab import __version__
from alignlab.errors import ConfigError
from alignlab.verb_table import VERBS


@dataclass
class Arguments:
    """The parts of one command line."""

    verb: str = ""
    words: list[str] = field(default_factory=list)
    """files, folders and ``key=value``, in the order typed; the verb's own flags stand as settings"""
    json: bool | Path = False
    """``--json``: True is standard output, a path is the file to write"""
    sweep: bool = False
    help: str = ""
    """the text asked for instead of work (:func:`help_text`): ``beginner``, ``all``, ``version`` or a verb"""


def parse(words: list[str]) -> Arguments:
    """Take a command line apart; an unknown verb is a :class:`ConfigError`, unknown flags stay among the words."""
    found = Arguments()
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
            found.verb = verb_named(word)
        else:
            found.words.append(word)
    if not found.verb and not found.help:
        found.help = "beginner"
    found.words = _flags(found)
    return found


def _flags(found: Arguments) -> list[str]:
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


def verb_named(word: str) -> str:
    """``word``, if it is a verb; else a :class:`ConfigError` with the nearest one."""
    if word in VERBS:
        return word
    if "=" in word:
        raise ConfigError(f"a verb comes first: alignlab train {word} ...")
    near = difflib.get_close_matches(word, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
    raise ConfigError(f"unknown verb '{word}': {hint}")


def help_text(which: str) -> str:
    """What ``--help`` (``beginner``), ``--help-all`` (``all``), ``--version`` or ``VERB --help`` answers."""
    if which == "version":
        return f"alignlab {__version__}"
    return _help_of_verb(which) if which in VERBS else _help_of_all(everything=which == "all")


def _help_of_verb(name: str) -> str:
    verb = VERBS[name]
    target = {"config": "[FILE.yaml | RUN]", "model": "RUN_OR_MODEL", "words": "..."}[verb.target]
    flags = "".join(f" [--{flag.replace('=', ' ')}]" for flag in verb.flags)
    own = f"Its own keys: {' '.join(verb.own)}\n" if verb.own else ""
    forms = "".join(f"  alignlab {form}\n" for form in verb.forms) + "\n" * bool(verb.forms)
    about = f"{verb.help}\n\n{forms}{own}All keys: alignlab show"
    return f"alignlab {name} {target}{flags} [key=value ...]\n\n{about}"


def _help_of_all(everything: bool) -> str:
    lines = ["alignlab <verb> [FILE.yaml | RUN_OR_FOLDER] [key=value ...] [-m] [--json [PATH.json]]", ""]
    for name, verb in VERBS.items():
        if verb.beginner or everything:
            lines.append(f"  {name:<10} {verb.help}")
    if not everything:
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
