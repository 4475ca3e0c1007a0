"""One rank of the runs that need several: ``python -m alignlab.equivalence.ranks FOLDER``, started by the matrix."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from alignlab import dist
from alignlab.configuration.frozen import load_frozen
from alignlab.durable import write_atomic
from alignlab.equivalence.cells import Run
from alignlab.equivalence.compare import Trace
from alignlab.equivalence.matrix import Outcome, attempt
from alignlab.equivalence.runs import Rows
from alignlab.launching.launch import captured_output
from alignlab.processes import die_with_parent
from alignlab.runfolder import RunFolder


def main(path: str) -> None:
    """Every run of ``task.json`` in order; rank 0 writes what came of each before the next begins."""
    folder = RunFolder(path)
    with captured_output(folder, dist.rank()):
        task = json.loads((folder.path / "task.json").read_text(encoding="utf-8"))
        config = load_frozen(folder.path)
        rows = Rows.of(config, task["rows"], task["steps"])
        dist.init(timeout=config.engine.timeout, group=True)
        dist.agree("the data index", rows.data.train.index.hash)
        for number, fields in enumerate(task["runs"]):
            run = Run(**{**fields, "settings": tuple((key, value) for key, value in fields["settings"])})
            outcome = attempt(config, run, rows, folder.path / f"run-{number}")
            if dist.is_main():
                write_atomic(folder.path / f"outcome-{number}.json", json.dumps(_plain(outcome)))
        dist.shutdown()


def _plain(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Trace):
        return asdict(outcome)
    return {"kind": type(outcome).__name__, "error": str(outcome)}


if __name__ == "__main__":
    die_with_parent()
    main(sys.argv[1])
