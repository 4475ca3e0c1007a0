"""Start runs, hurt them, and compare what they left: the shared ground of the chaos shards and of their tests.

with Harness(folder) as harness:
    run = harness.run("zero2", ranks=2, steps=40, save_steps=4)
    straight = run.finish()                       # a run that nobody touches
    hurt = harness.run("zero2", ranks=2, steps=40, save_steps=4)
    process = hurt.start(); ...; process.kill("1"); process.wait(); hurt.finish()
    assert hurt.outcome() == straight.outcome()
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import forks  # noqa: E402


@dataclass
class Started:
    """A launcher that runs, or ran."""

    process: subprocess.Popen[bytes] | forks.Started
    log: Path
    cwd: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """The launcher's exit code (negative: the signal that ended it), or None while it runs."""
        return self.process.poll()

    def wait(self, timeout: float = 120.0) -> int:
        """The exit code; TimeoutError, with everything of this run killed, when it takes too long."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill_all()
                raise TimeoutError(f"the run in {self.cwd} still goes on after {timeout} s; {self.tail()}")
            time.sleep(0.01)
        return code

    def pids(self) -> dict[str, int]:
        """Living processes by role: ``launcher``, ``agent``, ``0``, ``1``, ..."""
        found = {"launcher": self.pid}
        if isinstance(self.process, subprocess.Popen):
            found |= _torchrun_tree(self.pid)
        else:
            with suppress(FileNotFoundError, ValueError):
                found |= json.loads((self.cwd / "pids.json").read_text())
        return {role: pid for role, pid in found.items() if alive(pid)}

    def kill(self, role: str, number: int = signal.SIGKILL) -> bool:
        """Send a signal; whether the process was there."""
        pid = self.pids().get(role)
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def kill_all(self) -> None:
        """SIGKILL every process of the run."""
        for role in self.pids():
            self.kill(role)

    def tail(self) -> str:
        """The end of what the launcher printed."""
        return self.log.read_text(errors="replace")[-2000:]


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _torchrun_tree(launcher: int) -> dict[str, int]:
    """torchrun's agent and its ranks below a launcher."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[str, int] = {}
    for agent in parents.get(launcher, []):
        found["agent"] = agent
        for worker in parents.get(agent, []):
            try:
                environment = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for entry_ in environment:
                if entry_.startswith(b"RANK="):
                    found[entry_[5:].decode()] = worker
    return found


@dataclass
class Run:
    """One run folder, to be started as often as it takes."""

    harness: Harness
    folder: Path
    settings: list[str]
    real: bool = False
    """through ``python -m alignlab`` and torchrun instead of the zygote"""
    starts: int = 0
    codes: list[int] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The run folder proper."""
        return self.folder / "runs" / "run"

    def start(self, *more: str, fault: str = "", **environment: str) -> Started:
        """Start (or go on with) the run; ``fault`` goes to the test's plug-in (see ``faults.py``)."""
        self.starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "pids.json").unlink(missing_ok=True)
        log = self.folder / f"start-{self.starts}.txt"
        env = {**self.harness.environment, **environment, "ALIGNLAB_FAULT": fault}
        argv = ["train", *self.settings, *more]
        if self.real:
            argv.append(f"plugins=[{HERE / 'faults.py'}]")  # always: a run keeps its plug-ins
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [sys.executable, "-m", "alignlab", *argv], cwd=self.folder, env={**os.environ, **env},
                    stdout=stream, stderr=subprocess.STDOUT,
                )  # fmt: skip
            return Started(process, log, self.folder)
        with log.open("wb") as stream:
            return Started(forks.start(*argv, cwd=self.folder, env=env, output=stream), log, self.folder)

    def finish(self, timeout: float = 120.0) -> dict[str, Any]:
        """Start once more and wait for the end; :meth:`outcome`."""
        started = self.start()
        code = started.wait(timeout)
        self.codes.append(code)
        if code != 0:
            raise AssertionError(f"the run in {self.folder} ended with {code}: {started.tail()}")
        return self.outcome()

    def status(self) -> dict[str, Any]:
        """``status.json``; empty where there is none."""
        try:
            return json.loads((self.path / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def rows(self) -> list[dict[str, Any]]:
        """Training rows of metrics.jsonl, of every attempt."""
        try:
            text = (self.path / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        found = []
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a kill may cut the last line of an attempt
                continue
            if "loss" in row:
                found.append(row)
        return found

    def curve(self) -> dict[int, tuple[str, str]]:
        """(loss, gradient norm) as hex floats by step; a step that two attempts disagree on is an AssertionError."""
        found: dict[int, tuple[str, str]] = {}
        for row in self.rows():
            value = _hex(row["loss"]), _hex(row["grad_norm"])
            before = found.setdefault(int(row["step"]), value)
            if before != value:
                raise AssertionError(f"step {row['step']} of {self.folder}: {before} and, replayed, {value}")
        return found

    def outcome(self) -> dict[str, Any]:
        """Everything that must not depend on what happened on the way."""
        weights = self.path / "model" / "model.safetensors"
        return {
            "curve": self.curve(),
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None,
            "state": self.status().get("state"),
        }

    def checkpoints(self) -> list[int]:
        """Steps of the published checkpoints, ascending."""
        root = self.path / "checkpoints"
        return sorted(int(p.name.rpartition("-")[2]) for p in root.glob("checkpoint-*")) if root.is_dir() else []

    def leftovers(self) -> list[str]:
        """Staging folders that a killed writer left."""
        root = self.path / "checkpoints"
        return sorted(p.name for p in root.iterdir() if p.name.startswith(".")) if root.is_dir() else []


class Harness:
    """A model, a cache; makes runs below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = {**forks.ENVIRONMENT, "ALIGNLAB_CACHE": str(self.folder / "cache")}
        self.model = self.folder / "model"
        if not (self.model / "config.json").exists():
            _make_model(self.model)
        self._count = 0

    def __enter__(self) -> Harness:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        forks.zygote.close()  # and with it what still runs

    def run(
        self,
        engine: str = "zero2",
        *more: str,
        ranks: int = 2,
        steps: int = 40,
        save_steps: int = 4,
        real: bool = False,
    ) -> Run:
        """A new run: DPO on rows of the built-in world, 4 pairs a step."""
        self._count += 1
        settings = [
            f"model={self.model}", "data=sums", "data.options={rows: 64, eval_rows: 4}", "objective=dpo",
            f"engine={engine}", f"launch.nproc={ranks}", f"train.max_steps={steps}", "train.global_batch_size=4",
            f"train.save_steps={save_steps}", "optim.learning_rate=1e-3", "run.name=run", *more,
        ]  # fmt: skip
        return Run(self, self.folder / f"{engine}-{self._count:04d}", settings, real)


def _hex(value: float | None) -> str:
    """All bits of a figure; a null is one of a skipped step."""
    return "null" if value is None else float(value).hex()


def _make_model(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("export_cells", ROOT / "tests/unit/verbs/export_cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_model(folder)
