"""Objectives, row formats and verifiers from one file outside the repository (``plugins=[./mine.py]``).

A plug-in is the user's own Python: it runs as it is.  So it is loaded only when the command line or the user's own
YAML names it, never because a recipe or a data set does; its bytes are copied into the run folder and the workers
load that copy, so editing the file does not change a run that has started.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from alignlab.errors import ConfigError


@dataclass(frozen=True)
class Plugin:
    """One loaded file."""

    path: Path
    sha256: str


_loaded: dict[str, Plugin] = {}
"""By hash: the same bytes register once a process, wherever they lie."""


def load(names: list[str], beside: Path | None = None) -> list[Plugin]:
    """Run each file once; :class:`ConfigError` names the file and line of whatever fails.

    ``beside`` is the folder of the YAML file that names the plug-ins: copies in its ``plugins/`` serve where the
    original is gone.
    """
    return [_load(find(name, beside)) for name in names]


def find(name: str, beside: Path | None = None) -> Path:
    """Where a plug-in lies: the path as given, else the copy in a run folder."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path.resolve()
    copy = beside / "plugins" / path.name if beside else None
    if copy is not None and copy.is_file():
        return copy.resolve()
    raise ConfigError(f"plugins: no such file: {name}")


def _load(path: Path) -> Plugin:
    code = path.read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    if digest in _loaded:
        return _loaded[digest]
    name = f"alignlab_plugin_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugins: {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look the module up by name
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        del sys.modules[name]
        raise ConfigError(f"plugins: {path.name}: {error}") from None
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"plugins: {path.name}: line {_line(error, path)}: {type(error).__name__}: {error}") from None
    plugin = Plugin(path, digest)
    _loaded[digest] = plugin
    return plugin


def _line(error: Exception, path: Path) -> int | str:
    if isinstance(error, SyntaxError) and error.lineno:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines and lines[-1] else "?"


def copy(plugins: list[Plugin], folder: Path) -> None:
    """Put the files and their hashes into a run's ``plugins`` folder; what stood there before goes."""
    if not plugins and not folder.exists():
        return
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    names: dict[str, str] = {}
    for number, plugin in enumerate(plugins):
        name = plugin.path.name if plugin.path.name not in names else f"{number}-{plugin.path.name}"
        (folder / name).write_bytes(plugin.path.read_bytes())
        names[name] = plugin.sha256
    (folder / "plugins.json").write_text(json.dumps(names, indent=1) + "\n")


def load_copies(folder: Path) -> list[Plugin]:
    """Load what :func:`copy` wrote, in its order; a file that changed since is refused."""
    listing = folder / "plugins.json"
    if not listing.exists():
        return []
    found = []
    try:
        names = dict(json.loads(listing.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{listing}: cannot be read ({' '.join(str(error).split())})") from None
    for name, digest in names.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ConfigError(f"{path}: missing or changed since the run started")
        found.append(_load(path))
    return found
