"""``alignlab chat RUN_OR_MODEL``: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

from alignlab import dist
from alignlab.data.condition import Conditioner
from alignlab.errors import ConfigError, DataError
from alignlab.measuring.sampling import Sampler
from alignlab.measuring.verification import Prompt
from alignlab.request import Request, emit
from alignlab.runs.job import make_objective
from alignlab.types import Message
from alignlab.verbs.evaluate import trained
from alignlab.verbs.options import own_options

PROMPT = "> "
COMMANDS = {"/new": "forget the conversation", "/undo": "take the last answer back", "/quit": "leave (so does Ctrl-D)"}


@dataclass
class Options:
    """The verb's own settings."""

    system: str = ""
    """The first turn of every conversation; empty: none."""
    condition: dict[str, float] = field(default_factory=dict)
    """cpsft, cpo: the levels that every answer is asked for."""


def run(request: Request) -> int:
    """Read a line, print the answer, keep both; ``--json`` gives the turns at the end."""
    options = own_options(request, Options)
    config, _ = trained(request)
    stage = make_objective(config).stage if config.objective is not None else None
    if options.condition and stage is None:
        raise ConfigError("chat: condition= is for a run of objective=cpsft or objective=cpo")
    conditioner = Conditioner(config.data.condition, stage) if stage and options.condition else None
    sampler = Sampler(config, "chat")
    begin: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    turns, out, number = list(begin), sys.stderr if request.json is True else sys.stdout, 0
    if sys.stdin.isatty():
        print(
            f"{config.model.name_or_path}   {'   '.join(f'{name}: {what}' for name, what in COMMANDS.items())}",
            file=out,
        )
    for line in _lines(out):
        if line == "/quit":
            break
        if line in ("/new", "/undo"):
            turns = list(begin) if line == "/new" else turns[: max(len(begin), len(turns) - 2)]
            continue
        if line.startswith("/"):
            print(f"unknown: {line} (known: {', '.join(COMMANDS)})", file=out)
            continue
        asked: list[Message] = [*turns, {"role": "user", "content": line}]
        shown = conditioner.prompt(options.condition, asked) if conditioner else asked
        number += 1
        draw = dist.derive_seed(config.seed, "chat", number)  # the same line said twice may be answered otherwise
        try:
            (answer,) = sampler.answers([Prompt("chat", shown)], num_samples=1, verifier=None, seed=draw)
        except DataError as error:
            print(f"not asked: {error}", file=out)
            continue
        print(answer.texts[0], file=out, flush=True)
        turns = [*asked, {"role": "assistant", "content": answer.texts[0]}]
    emit(request, {"model": config.model.name_or_path, "messages": turns})
    return 0


def _lines(out: TextIO) -> Iterator[str]:
    """What the user says, a line each, until the end of the input; empty lines say nothing."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # the arrow keys
    while True:
        if interactive:
            print(PROMPT, end="", file=out, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
