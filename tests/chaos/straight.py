"""Runs made once for all cases of a sitting, and copies of run folders."""

from __future__ import annotations

import shutil
from typing import Any

from harness import Harness, Run

_runs: dict[tuple[str, str], Run] = {}


def kept(harness: Harness, engine: str, *more: str, fault: str = "", **options: Any) -> Run:
    """A run with these settings and one start; its folder outlives the case."""
    key = str(harness.folder), repr((engine, more, fault, sorted(options.items())))
    if key not in _runs:
        run = harness.run(engine, *more, **options)
        run.folder = run.folder.with_name(run.folder.name + "-kept")
        code = run.start(fault=fault).wait()
        if (code != 0) is not ("kill" in fault):
            raise AssertionError(f"{run.folder} ended with {code}: {run.status()}")
        _runs[key] = run
    return _runs[key]


def straight(harness: Harness, engine: str, *more: str, **options: Any) -> dict[str, Any]:
    """The outcome of an undisturbed run with these settings."""
    return kept(harness, engine, *more, **options).outcome()


def copy(run: Run) -> Run:
    """A second run that stands where ``run`` stands."""
    run.harness._count += 1
    twin = Run(run.harness, run.harness.folder / f"copy-{run.harness._count:04d}", run.settings)
    shutil.copytree(run.folder, twin.folder, ignore=shutil.ignore_patterns("start-*.txt*"))
    return twin
