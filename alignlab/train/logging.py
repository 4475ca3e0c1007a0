"""Where a run's figures go: metrics.jsonl and the console always, wandb and tensorboard when asked.

Rank 0 only.  Nothing here can change a number or an exit code: a tracker that cannot be reached is reported once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from alignlab.config import LoggerConfig

SHOWN = {
    "rewards/accuracies": "acc",
    "rewards/margins": "margin",
    "accuracy": "acc",
    "margin": "margin",
    "negative_weight_share": "neg",
}
"""Statistics that have a place in the step line, with their short names."""


class Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line: step, attempt, metrics; flushed at once, so that a killed run keeps its history.

    JSON has no NaN: a figure that is not finite (of a skipped step) is null.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._attempt = attempt

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "attempt": self._attempt, **plain}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Wandb:
    """Weights & Biases: offline unless a key exists, never interactive, run id = run name so a resume continues it."""

    def __init__(self, project: str, run_name: str, config: Mapping[str, Any], folder: Path) -> None:
        import wandb

        mode: Any = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        settings = wandb.Settings(init_timeout=15, silent=True, console="off")
        options: dict[str, Any] = {
            "project": project, "name": run_name, "id": run_name, "resume": "allow", "config": dict(config),
            "dir": str(folder), "settings": settings,
        }  # fmt: skip
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:
            print(f"wandb      cannot be reached ({type(error).__name__}); writing offline", file=sys.stderr)
            self._run = wandb.init(mode="offline", **options)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def make_sinks(
    config: LoggerConfig, folder: Path, attempt: int, run_name: str, frozen: Mapping[str, Any]
) -> list[Sink]:
    """metrics.jsonl first, then what ``logger`` names."""
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", attempt)]
    if "wandb" in config.names:
        sinks.append(Wandb(config.project, run_name, frozen, folder))
    if "tensorboard" in config.names:
        sinks.append(TensorBoard(folder))
    return sinks


class Console:
    """The ten lines before the first step, then one a step; on a terminal the step line is a live bar."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._bar: Any = None

    def line(self, head: str, text: str) -> None:
        """A headed line: ``run      dpo-...``."""
        self.close()
        if not self._quiet:
            print(f"{head:<8} {text}", file=self._stream, flush=True)

    def step(self, step: int, total: int, text: str) -> None:
        """The figures of one logging interval."""
        if self._quiet:
            return
        if not self._live:
            print(f"{step:>6}/{total} {text}", file=self._stream, flush=True)
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=step, description=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_text(metrics: Mapping[str, float], extra: Mapping[str, str]) -> str:
    """``loss 0.6912 acc 0.54 margin 0.004 grad_norm 3.1 lr 1e-7 tok/s 11k``."""
    parts = [f"loss {metrics['loss']:.4f}"]
    parts += [f"{short} {metrics[name]:.3g}" for name, short in SHOWN.items() if name in metrics]
    parts += [f"grad_norm {metrics['grad_norm']:.3g}", f"lr {metrics['learning_rate']:.2g}"]
    parts += [f"{name} {value}" for name, value in extra.items()]
    return " ".join(parts)


def count(number: float) -> str:
    """11,300 -> 11k; 1,900,000 -> 1.9M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"
