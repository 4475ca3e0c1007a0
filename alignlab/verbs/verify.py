"""``alignlab verify``: ways to train that must agree, tried on the user's own configuration and rows.

A matrix, a line a cell, with the largest relative difference of every quantity and its tolerance; exit code 1 when a
cell fails.  What each cell compares is in :mod:`alignlab.equivalence.cells`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from alignlab.equivalence.matrix import Matrix, Result
from alignlab.launching.launch import captured_output
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder
from alignlab.verbs.options import own_options
from alignlab.worker import library_log

COLUMNS = ("loss", "grad_norm", "statistics", "update", "scores")


@dataclass
class Options:
    """The verb's own settings, beside those of ``train``."""

    rows: int = 16
    """So many rows, the first of the first epoch."""
    steps: int = 3
    """Optimizer steps; the rows' examples are divided among them."""
    layers: int | None = None
    """Only the model's first layers."""
    cells: list[str] = field(default_factory=list)
    """Names or patterns (``zero*``); empty: all."""


def run(request: Request) -> int:
    """Print the matrix (or give it as JSON); 1 when a cell failed."""
    started = time.perf_counter()
    options = options_of(request)
    with Matrix(
        request.config, rows=options.rows, steps=options.steps, layers=options.layers, cells=options.cells,
        code=request.plugins,
    ) as matrix:  # fmt: skip
        folder = RunFolder(matrix.folder)
        with captured_output(folder, 0) as screen, library_log(folder, 0):
            matrix.prepare()
            print(_head(matrix), file=screen)
            results = matrix.run(lambda result: print(_line(result), file=screen, flush=True))
        seconds = time.perf_counter() - started
        answer = _answer(matrix, options, results, seconds)
        print(f"verdict  {_verdict(results, answer['counts'])}   {seconds:.0f} s")
        emit(request, answer | {"model": request.config.model.name_or_path})
    return 0 if answer["ok"] else 1


def _answer(matrix: Matrix, options: Options, results: list[Result], seconds: float) -> dict[str, Any]:
    counts = {status: sum(result.status == status for result in results) for status in ("ok", "failed", "skipped")}
    return {
        "objective": matrix.objective.name,
        "layers": options.layers,
        "rows": len(matrix.rows.data.train.index),
        "examples": matrix.rows.examples,
        "steps": options.steps,
        "layout": matrix.layout,
        "ok": counts["ok"] > 0 and not counts["failed"],
        "counts": counts,
        "cells": [result.as_json() for result in results],
        "seconds": round(seconds, 2),
    }


def options_of(request: Request) -> Options:
    """The verb's own settings from text or Python values; ConfigError says what was expected."""
    cells = request.own.get("cells")
    if isinstance(cells, str):  # in YAML a * is an alias
        words = [word.strip() for word in cells.strip("[]").split(",") if word.strip()]
        request = replace(request, own=request.own | {"cells": words})
    return own_options(request, Options)


def _head(matrix: Matrix) -> str:
    rows = matrix.rows
    titles = " ".join(f"{name:>10}" for name in COLUMNS)
    return (
        f"object   {matrix.objective.name}   {len(rows.data.train.index)} rows, {rows.examples} examples in "
        f"{rows.steps} steps   layout {matrix.layout}   plain engine {matrix.dtype}, others {matrix.engine_dtype}\n"
        f"{'cell':<15} {'base | variant':<36} {titles}  tolerance (of updates)"
    )


def _line(result: Result) -> str:
    line = f"{result.cell.name:<15} {result.cell.what:<36} "
    if not result.differences:
        return f"{line}{result.status}: {result.reason}"
    shown = (f"{result.differences[n]:.1e}" if n in result.differences else "-" for n in COLUMNS)
    limits = f"{result.tolerance.numbers:.0e} ({result.tolerance.update:.0e})"
    verdict = "ok" if result.status == "ok" else "FAILED"
    return line + " ".join(f"{text:>10}" for text in shown) + f"  {limits:<14} {verdict}"


def _verdict(results: list[Result], counts: dict[str, int]) -> str:
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    failed = [result.cell.name for result in results if result.status == "failed"]
    return text + (f"   failed: {', '.join(failed)}" if failed else "")
