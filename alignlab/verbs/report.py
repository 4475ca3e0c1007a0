"""``alignlab report RUN``: the page of a run: its curves, how to read them, and the pairs it makes suspect."""

from __future__ import annotations

from typing import Any

import numpy as np

from alignlab.data.index import Index
from alignlab.data.ledger import read_samples
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError
from alignlab.measuring.forensics import Figures, Paths, figures, paths
from alignlab.measuring.report import Suspect, most_suspect, page, read_series
from alignlab.request import Request, emit
from alignlab.runfolder import RunFolder
from alignlab.runs.job import prepare_data
from alignlab.train.margins import read_margins

SUSPECTS = 50
SHOWN = 5
"""On the screen; the page and ``--json`` have all."""
LONGEST_PATH = 24
"""Visits of a pair that are written out; of more, as many that lie evenly."""


def run(request: Request) -> int:
    """Write ``report.html`` into the run's folder; ``suspects=N`` pairs are on it."""
    if request.file is None or not (request.file.parent / "metrics.jsonl").exists():
        raise ConfigError("report takes the folder of a run that has begun to train: alignlab report runs/x")
    folder = RunFolder(request.file.parent)
    number = _number(request)
    series = read_series(folder.path)
    found = paths(read_margins(folder.ledger))
    suspects, note = [], "This run trained on no pairs, so there is none to suspect."
    if len(found):
        counts = figures(found)
        suspects = _suspects(request, folder, found, counts, number)
        note = (
            f"The {len(suspects)} of {len(found):,} pairs whose margin stayed furthest below that of pairs seen about "
            "the same time (suspicion: how far, in their standard deviations). Wrong labels gather here, and so do "
            "pairs that are hard: read before you leave one out."
        )
    status = folder.status()
    facts = [
        ("state", f"{status.get('state', 'unknown')}, step {status.get('step', 0)} of {status.get('total', '?')}"),
        ("objective", request.config.objective.name),
        ("model", str(request.config.model.name_or_path)),
        ("data", str(request.config.data.path or "a mixture of sources")),
    ]
    path = folder.path / "report.html"
    write_atomic(path, page(folder.name, facts, series, suspects, note))
    print(f"pairs    {len(found):,} seen, {int(np.diff(found.ptr).sum()):,} visits")
    for suspect in suspects[:SHOWN]:
        print(f"suspect  {suspect.figures['suspicion']:6.2f}   {suspect.sample}   {suspect.place}")
    print(f"written  {path}")
    emit(request, {"page": str(path), "pairs": len(found), "suspects": [_as_json(suspect) for suspect in suspects]})
    return 0


def _number(request: Request) -> int:
    text = str(request.own.get("suspects", SUSPECTS))
    if not text.isdigit():
        raise ConfigError(f"report: suspects={text} is not a number of pairs")
    return int(text)


def _suspects(request: Request, folder: RunFolder, found: Paths, counts: Figures, number: int) -> list[Suspect]:
    data = prepare_data(request.config)
    account = read_samples(folder.ledger).select(["number", "id", "file", "line"]).to_pylist()
    rows = {row["number"]: row for row in account if row["number"] is not None}
    out = []
    for pair in most_suspect(found, counts, number):
        row = rows[int(found.sample[pair])]
        sides = _texts(data.train.index, data.tokenizer, found, pair)
        steps, margins = found.of(pair)
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), LONGEST_PATH)).round().astype(int))
        names = ("suspicion", "mean", "last", "confidence", "variability", "flips", "visits")
        out.append(
            Suspect(
                sample=row["id"],
                place=f"{row['file'] or ''}:{row['line'] or ''}".strip(":"),
                prompt=sides[0],
                chosen=sides[1],
                rejected=sides[2],
                figures={name: float(getattr(counts, name)[pair]) for name in names},
                path=[(int(steps[i]), float(margins[i])) for i in kept],
            )
        )
    return out


def _texts(index: Index, tokenizer: Any, found: Paths, pair: int) -> tuple[str, str, str]:
    """(what both sides share, the rest of the chosen one, the rest of the rejected one), decoded."""
    first = int(index.sample_ptr[found.sample[pair]])
    chosen, rejected = (index.sequence(first + int(side[pair])).tokens for side in (found.chosen, found.rejected))
    length = min(len(chosen), len(rejected))
    differ = np.flatnonzero(chosen[:length] != rejected[:length])
    shared = int(differ[0]) if len(differ) else length
    pieces = (chosen[:shared], chosen[shared:], rejected[shared:])
    if tokenizer is None:
        return tuple(" ".join(map(str, piece.tolist())) for piece in pieces)  # type: ignore[return-value]
    return tuple(tokenizer.decode(piece.tolist()) for piece in pieces)  # type: ignore[return-value]


def _as_json(suspect: Suspect) -> dict[str, Any]:
    return {
        "id": suspect.sample, "place": suspect.place, **suspect.figures, "path": suspect.path,
        "prompt": suspect.prompt, "chosen": suspect.chosen, "rejected": suspect.rejected,
    }  # fmt: skip
