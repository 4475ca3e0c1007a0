"""Run the matrix: every run once, several ranks in one launch, and a verdict for each cell."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.configuration import plugins
from alignlab.configuration.frozen import frozen_text
from alignlab.data.pack import plain_form
from alignlab.durable import write_atomic
from alignlab.equivalence.cells import EXACT, ROUNDING, Cell, Run, Tolerance, chosen, matrix
from alignlab.equivalence.compare import Trace, allowed, differences
from alignlab.equivalence.cut import first_layers
from alignlab.equivalence.runs import Rows, base_config, execute
from alignlab.errors import AlignlabError, CheckFailed, ConfigError, OutOfMemoryError
from alignlab.launching import launch
from alignlab.models.load import load_model, resolve_dtype
from alignlab.models.proof import choose_layout
from alignlab.runfolder import RunFolder
from alignlab.runs.job import make_objective

RANKS_MODULE = "alignlab.equivalence.ranks"
LONGEST_WAIT = 120.0
"""Seconds before a collective between the ranks of a cell counts as hung; they hold a few rows."""
Outcome = Trace | AlignlabError


class Broken(CheckFailed):
    """A run that ended with an error that is none of ours."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {_line(error)}")
        self.error = error


@dataclass(frozen=True)
class Result:
    """A cell and what came of it.  ``reason`` says why it was skipped or what broke."""

    cell: Cell
    status: str
    """ok | failed | skipped"""
    tolerance: Tolerance
    differences: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0
    dtype: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values; a difference that is not finite is null."""
        base, _, variant = self.cell.what.partition(" | ")
        found = {name: value if value < float("inf") else None for name, value in self.differences.items()}
        return {
            "cell": self.cell.name, "base": base, "variant": variant, "status": self.status, "dtype": self.dtype,
            "differences": found, "tolerances": {name: allowed(name, self.tolerance) for name in self.differences},
            "reason": self.reason, "seconds": round(self.seconds, 2),
        }  # fmt: skip


class Matrix:
    """The cells of one configuration.  A context manager: the runs' files are gone when the block ends."""

    def __init__(
        self, config: RootConfig, *, rows: int = 16, steps: int = 3, layers: int | None = None,
        cells: Iterable[str] = (), code: Iterable[plugins.Plugin] = (),
    ) -> None:  # fmt: skip
        if dist.world_size() > 1:
            raise ConfigError("verify starts its own ranks: run it as one process, without torchrun")
        if steps < 2:
            raise ConfigError("steps: a resumed run needs at least 2")
        self._home = tempfile.TemporaryDirectory(prefix="alignlab-verify-")
        self.folder = Path(self._home.name)
        self._code = list(code)
        self._asked = (rows, steps, layers, list(cells))
        self.config = base_config(config)
        uses = {"compiled": config.train.torch_compile, "liger": config.model.use_liger_kernel}
        self._used = [cell for cell, is_used in uses.items() if is_used]
        self.objective = make_objective(config)
        self.dtype, self.engine_dtype = _dtypes(config.model.dtype)
        self._outcomes: dict[Run, Outcome] = {}

    def prepare(self) -> None:
        """Cut the model, prepare the rows and settle the layout: what goes wrong here would go wrong in ``train``."""
        rows, steps, layers, cells = self._asked
        config, head = self.config, self.objective.head
        if layers is not None:
            cut = first_layers(config.model, head, layers, config.seed, self.folder / "model")
            self.config = config = replace(config, model=cut)
        self.rows = Rows.of(config, rows, steps)
        model = load_model(config.model, head, resolve_dtype(self.engine_dtype, dist.device()), config.seed).model
        self.layout, _ = choose_layout(
            model, config.model.layout, mixes_inputs=self.objective.mixes_inputs, form=plain_form(dist.device())
        )
        self.cells = chosen(matrix(self.dtype, self.engine_dtype, self.layout), cells, self._used)
        self._exported = {cell.base for cell in self.cells if cell.variant is None}

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *_: object) -> None:
        self._home.cleanup()

    def run(self, report: Callable[[Result], None] = lambda result: None) -> list[Result]:
        """All cells in order; ``report`` gets each result as it is known.

        An error of a base that is what ``train`` does is raised: nothing could be compared with it.
        """
        results = []
        for place, cell in enumerate(self.cells):
            result = self._judge(cell)
            results.append(result)
            report(result)
            self._forget({run for later in self.cells[place + 1 :] for run in later.runs})
        return results

    # -----------------------------------------------------------------------------------------------------------
    # Judging
    # -----------------------------------------------------------------------------------------------------------

    def _judge(self, cell: Cell) -> Result:
        started = time.perf_counter()
        tolerance = EXACT if cell.exact else ROUNDING["float32"]

        def result(status: str, reason: str = "", found: dict[str, float] | None = None, dtype: str = "") -> Result:
            seconds = time.perf_counter() - started
            return Result(cell, status, tolerance, found or {}, reason, seconds, dtype)

        if reason := self._impossible(cell):
            return result("skipped", reason)
        base = self._outcome(cell.base)
        if isinstance(base, AlignlabError):
            if self._trains(cell.base):
                raise base.error if isinstance(base, Broken) else base
            return result(_status(base), str(base))
        if not cell.exact:
            tolerance = ROUNDING["float32" if cell.coarse and base.dtype == "float64" else base.dtype]
        if not any(base.grad_norms):
            raise CheckFailed("no parameter gets a gradient on these rows in any step: there is nothing to compare")
        if cell.variant is None:
            assert base.scores is not None
            found = {"scores": base.scores}
        else:
            variant = self._outcome(cell.variant)
            if isinstance(variant, AlignlabError):
                return result(_status(variant), str(variant))
            if cell.name == "checkpointing" and not variant.recomputes:
                return result("failed", "train.gradient_checkpointing=true, and nothing is recomputed")
            if reason := _same_thing(cell, base, variant):
                return result("skipped", reason)
            found = differences(base, variant, first_statistics=self._first_statistics(cell, base))
        passed = all(value <= allowed(name, tolerance) for name, value in found.items())
        return result("ok" if passed else "failed", "", found, base.dtype)

    def _trains(self, run: Run) -> bool:
        """Whether ``train`` would go this way: then what goes wrong is the user's to know, not a cell's."""
        return run.path == "straight" and run.get("engine.name") == "local" and run.get("model.layout") == self.layout

    def _first_statistics(self, cell: Cell, base: Trace) -> int | None:
        """The first step whose statistics are compared.

        A share of wins jumps where two rewards are next to equal.  In the first step a policy is its own reference and
        all of them are, so rounding decides; in float32 it may decide later too.
        """
        if cell.exact:
            return 0
        if base.dtype != "float64":
            return None
        return 1 if self.objective.needs_reference else 0

    def _impossible(self, cell: Cell) -> str:
        """Why a cell cannot be run here or for this objective, as far as that is known beforehand."""
        ranks = max(run.ranks for run in cell.runs)
        if ranks > 1 and torch.cuda.is_available() and torch.cuda.device_count() < ranks:
            return f"needs {ranks} GPUs, there is {torch.cuda.device_count()}"
        if cell.name == "reference" and not self.objective.needs_reference:
            return f"{self.objective.name} needs no reference"
        return ""

    # -----------------------------------------------------------------------------------------------------------
    # Running
    # -----------------------------------------------------------------------------------------------------------

    def _outcome(self, run: Run) -> Outcome:
        if run not in self._outcomes:
            if run.launched:
                self._launch(run.ranks)
            else:
                folder = self.folder / f"run-{len(self._outcomes)}"
                self._outcomes[run] = attempt(self.config, run, self.rows, folder, export=run in self._exported)
        return self._outcomes[run]

    def _launch(self, ranks: int) -> None:
        """All runs at this number of ranks that any cell needs, in one launch: it costs seconds, nearly all imports."""
        needed = (run for cell in self.cells for run in cell.runs if run.launched and run.ranks == ranks)
        runs = list(dict.fromkeys(needed))
        folder = RunFolder(self.folder / f"ranks-{ranks}")
        folder.logs.mkdir(parents=True)
        engine = replace(self.config.engine, timeout=min(self.config.engine.timeout, LONGEST_WAIT))
        plugins.copy(self._code, folder.plugins)
        write_atomic(folder.run_yaml, frozen_text(replace(self.config, engine=engine), {}))
        task = {"rows": self._asked[0], "steps": self.rows.steps, "runs": [asdict(run) for run in runs]}
        write_atomic(folder.path / "task.json", json.dumps(task))
        launch.supervise(folder, launch.torchrun(folder, ranks, module=RANKS_MODULE), json_wanted=True)
        for number, run in enumerate(runs):
            self._outcomes[run] = _reported(folder, number)

    def _forget(self, needed: set[Run]) -> None:
        """Remove the parameters of runs that no later cell compares."""
        for run, outcome in self._outcomes.items():
            if isinstance(outcome, Trace) and run not in needed:
                shutil.rmtree(Path(outcome.parameters).parent, ignore_errors=True)


def attempt(config: RootConfig, run: Run, rows: Rows, folder: Path, *, export: bool = False) -> Outcome:
    """One run; an error is an outcome, but for an unknown one on one of several ranks, which must not go on alone."""
    try:
        return execute(config, run, rows, folder, export=export)
    except AlignlabError as error:
        return error
    except torch.OutOfMemoryError as error:
        return OutOfMemoryError(f"{_line(error)}; set rows=... or data.max_length=... lower, or layers=...")
    except Exception as error:
        if run.launched:
            raise
        return Broken(error)


def _reported(folder: RunFolder, number: int) -> Outcome:
    """What rank 0 wrote of a launched run."""
    path = folder.path / f"outcome-{number}.json"
    if not path.is_file():
        lines = [line for file in (folder.log, *folder.logs.iterdir()) if file.is_file() for line in _text(file)]
        last = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")
        return CheckFailed(f"the ranks ended early: {last.strip()[:200]}")
    found = json.loads(path.read_text(encoding="utf-8"))
    if "error" in found:
        kinds = {kind.__name__: kind for kind in AlignlabError.__subclasses__()}
        return kinds.get(found["kind"], CheckFailed)(found["error"])
    return Trace(**found)


def _text(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _line(error: BaseException) -> str:
    return " ".join((str(error).strip() or "no message").split())[:200]


def _status(error: AlignlabError) -> str:
    """A way that cannot be gone here is skipped; one that breaks has failed."""
    return "skipped" if isinstance(error, ConfigError) else "failed"


def _same_thing(cell: Cell, base: Trace, variant: Trace) -> str:
    """Why the two runs do not differ in what the cell is about; else an empty string."""
    if cell.gains and variant.tokens >= base.tokens:
        return f"nothing is shared: {base.tokens} tokens either way ({variant.layout})"
    if cell.name == "eager" and variant.attention == base.attention:
        return f"the model takes no other attention than {base.attention}"
    if cell.name == "micro_batches" and max(variant.micro_batches) == 1:
        return "every step's examples come from one row, which is not cut"
    return ""


def _dtypes(wanted: str) -> tuple[str, str]:
    """(of the plain engine's cells, of the others).

    On a CPU, where nothing else is asked for, float64: only rounding is left to differ, so tolerances are tight.
    DeepSpeed has no float64.
    """
    if wanted == "auto":
        return ("bf16", "bf16") if dist.device().type == "cuda" else ("fp64", "fp32")
    return wanted, "fp32" if wanted == "fp64" else wanted
