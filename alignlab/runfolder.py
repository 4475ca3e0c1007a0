"""The folder of one run: its files, its status and its owner.

Everything that tells others about the run is written to a temporary name, synchronised and renamed, so a reader
never sees half a file and a killed run leaves the previous one.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignlab.data import cache
from alignlab.durable import write_atomic
from alignlab.errors import BusyError, ConfigError, Preempted, StorageError

OURS = (
    "run.yaml", "keys.json", "status.json", "env.json", "metrics.jsonl", "log.txt", "logs", "data", "checkpoints",
    "exports", "model", "eval", "plugins", "ledger", "tensorboard", "wandb", "launch.json", "launch.sbatch",
    "nonfinite.json", "nonfinite", "result.json",
)  # fmt: skip
"""What a run may leave in its folder: all that ``overwrite=true`` removes."""

FINISHED = "done"
_EARLY = re.compile(r"owner\.lock.*|logs|plugins|\.run\.yaml\.\d+\.tmp")
"""What a start has in its folder before ``run.yaml``."""


def state_of(code: int) -> str:
    """The state in ``status.json`` that an exit code means."""
    return {0: FINISHED, Preempted.exit_code: "preempted"}.get(code, "failed")


class RunFolder:
    """Paths of one run folder, and reading and writing of what is not a checkpoint."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self.run_yaml = self.path / "run.yaml"
        self.status_json = self.path / "status.json"
        self.env_json = self.path / "env.json"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "log.txt"
        self.logs = self.path / "logs"
        self.data = self.path / "data"
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "exports"
        self.model = self.path / "model"
        self.eval = self.path / "eval"
        self.plugins = self.path / "plugins"
        self.ledger = self.path / "ledger"
        self.nonfinite = self.path / "nonfinite"
        self.owner = self.path / "owner.lock"
        self.launch_json = self.path / "launch.json"
        self._token: str | None = None

    def __str__(self) -> str:
        return str(self.path)

    def refuse_links(self) -> None:
        """:class:`ConfigError` where a link stands in the run's place: what is written here must not land elsewhere."""
        inside = [self.path / name for name in OURS]
        inside += [path for folder in (self.logs, self.checkpoints, self.exports) for path in folder.glob("*")]
        for path in (self.path, *inside):
            if path.is_symlink():
                raise ConfigError(f"{path}: is a link; a run's files and folders are real ones (or set output_dir)")

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.run_yaml.exists()

    @property
    def begun(self) -> bool:
        """Whether the run here has done a step; a start that failed before holds nothing to protect."""
        return bool(self.status().get("step")) or any(self.checkpoints.glob("checkpoint-*"))

    @property
    def foreign(self) -> bool:
        """Whether the folder holds something and no run; what a start that died before ``run.yaml`` leaves is ours.

        Ask it as the owner: another start may be at work between its first file and that one.
        """
        if self.exists or not self.path.is_dir():
            return False
        return not all(_EARLY.fullmatch(path.name) for path in self.path.iterdir())

    def status(self) -> dict[str, Any]:
        """``status.json``; empty where there is none."""
        try:
            found = json.loads(self.status_json.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.status_json}: cannot be read ({error}); remove it to start anew") from None
        return found if isinstance(found, dict) else {}

    def write_status(self, **changes: Any) -> dict[str, Any]:
        """Change fields of ``status.json`` (state, step, exit_code, attempt, ...) at once; one writer at a time."""
        merged = {**self.status(), "run": self.name, **changes, "time": time.time()}
        write_atomic(self.status_json, json.dumps(merged, indent=1, default=str) + "\n")
        return merged

    @property
    def finished(self) -> bool:
        """Whether the run here has reached its end."""
        return self.status().get("state") == FINISHED

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Own the folder while the block runs; :class:`BusyError` names the owner where another process has it.

        A dead owner on this host, and an earlier start of the same cluster job, are taken over at once.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be made ({error.strerror}); choose another output_dir") from None
        owner = cache.lock(self.path / "owner", timeout=0.0)
        try:
            owner.__enter__()
        except BusyError:
            if self._owner().get("host") in (None, socket.gethostname()) or self._beats():
                raise BusyError(f"{self}: in use by {self.owner_text()}; wait, stop it, or choose run.name") from None
            owner = cache.lock(self.path / "owner", timeout=cache.STALE_AFTER)
            owner.__enter__()
        self._token = self._owner().get("token")
        try:
            yield
        finally:
            self._token = None
            owner.__exit__(None, None, None)

    @property
    def disowned(self) -> bool:
        """Whether this process claimed the folder and another has taken it over since (a restart of its job)."""
        if self._token is None:
            return False
        try:
            return self._token not in self.owner.read_text()
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def _beats(self) -> bool:
        """Whether an owner on another host gives a sign of life, looked for during a few of its heartbeats."""
        print(f"{self}: is {self.owner_text()} alive? Looking for a heartbeat", file=sys.stderr, flush=True)
        try:
            before = self.owner.stat().st_mtime_ns
            deadline = time.monotonic() + cache.STALE_AFTER / 4
            while time.monotonic() < deadline:
                time.sleep(0.5)
                if self.owner.stat().st_mtime_ns != before:
                    return True
        except FileNotFoundError:
            pass
        return False

    def _owner(self) -> dict[str, Any]:
        try:
            found = json.loads(self.owner.read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return found if isinstance(found, dict) else {}

    def owner_text(self) -> str:
        """Who owns the folder: process, host, job."""
        owner = self._owner()
        if not owner:
            return "another process"
        job = f", job {owner['job']}" if owner.get("job") else ""
        return f"process {owner.get('pid')} on {owner.get('host')}{job}"

    def clear(self) -> None:
        """Remove what an earlier run left, and nothing else; a link is removed, never followed."""
        for name in OURS:
            path = self.path / name
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.exists() or path.is_symlink():
                    path.unlink()
            except OSError as error:
                raise StorageError(f"{path}: cannot be removed ({error.strerror})") from None


def finished_model(name: str, key: str) -> tuple[str, RunFolder | None]:
    """(what to load, the run it comes from) for a run, its ``model`` folder, another folder or a hub name.

    ``key`` is who asks, for the :class:`ConfigError` of a run that has no model yet.
    """
    path = Path(name).expanduser()
    folder = path.parent if path.name == "model" else path
    if not (folder / "run.yaml").is_file():
        return name, None
    run = RunFolder(folder)
    run.refuse_links()
    if not run.model.is_dir():
        raise ConfigError(f"{key}: {folder} has no finished model; run the training to its end first")
    return str(run.model), run
