"""``alignlab validate``: what is wrong with a configuration, said without a GPU, training or a connection.

Every problem is a line, all of them together, and exit code 2; else one line ``ok``, and what could not be looked at
because it is not on this machine.  ``dry_run=true`` also takes two optimizer steps with the shapes cut down.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from alignlab.errors import AlignlabError, ConfigError
from alignlab.launching.launch import run_folder
from alignlab.recipes.dry_run import DryRun, dry_run
from alignlab.request import Request, emit
from alignlab.validation import validate
from alignlab.verbs.options import own_options


@dataclass
class Options:
    """The verb's own settings."""

    dry_run: bool = False
    """Train two steps on made-up rows with a small model of the same family; optimizer, adapter and loss as set."""


def run(request: Request) -> int:
    """Exit code 0, or the :class:`ConfigError` that holds all problems."""
    options = own_options(request, Options)
    found = validate(request)
    if found.problems:
        raise ConfigError("\n".join(dict.fromkeys(found.problems)))
    tried = _dry_run(request) if options.dry_run else None
    folder = run_folder(request.config)
    print("\n".join([f"ok       {folder.name} -> {folder}", *found.notes]))
    if tried is not None:
        print(f"dry run  {tried.model}; loss {', then '.join(f'{loss:.4f}' for loss in tried.losses)}")
    dry = tried.as_json() if tried is not None else None
    emit(request, {"ok": True, "run": folder.name, "notes": found.notes, "dry_run": dry})
    return 0


def _dry_run(request: Request) -> DryRun:
    with tempfile.TemporaryDirectory(prefix="alignlab-") as folder:
        try:
            return dry_run(request.config, Path(folder) / "run")
        except AlignlabError as error:
            raise type(error)(f"dry run: {error}") from error
