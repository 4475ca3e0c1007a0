"""``alignlab train -m ...``: every combination of comma lists, ``choice()`` and ``range()``, one launch a point.

The grammar and the order are those of Hydra's basic sweeper.  Each point is a process of its own, so nothing of one
outlives it; a failed point is recorded and the sweep goes on; the same command again runs only what is not done.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

from alignlab import liveness
from alignlab.configuration import names, schema, yamlio
from alignlab.durable import write_atomic
from alignlab.errors import AlignlabError, ConfigError, Preempted
from alignlab.processes import call
from alignlab.request import Request, emit, make_request
from alignlab.runfolder import RunFolder, state_of

MANAGED = ("run.name", "output_dir")


def sweep(request: Request) -> int:
    """Run all points; 0 when each is done (or submitted), 1 when one failed, 75 when the sweep was asked to stop."""
    if request.verb != "train":
        raise ConfigError(f"-m sweeps 'train' only, not '{request.verb}'")
    fixed, axes = split(request.overrides)
    if not axes:
        raise ConfigError("-m without anything to sweep: give a comma list or range(), e.g. seed=0,1,2")
    points = [list(point) for point in itertools.product(*axes)]
    composed = _composed(request, fixed, points)
    first = next(iter(composed.values()))
    reads = liveness.check_sweep(composed)
    folder = names.beside_runs(
        first.config, "sweeps", lambda: {"numbers": names.number_keys(first.config), "points": points}
    )
    if first.config.launch.dry_run:
        for number, point in enumerate(points):
            print(f"{number:03d}  {' '.join(point)}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "sweep.yaml", _description(request, fixed, points))
    rows: list[dict[str, Any]] = []
    for number, point in enumerate(points):
        rows.append(_run_point(request, folder, number, fixed, point, reads))
        write_atomic(folder / "results.csv", table(rows))
        if rows[-1]["exit_code"] == Preempted.exit_code:
            raise Preempted(f"sweep stopped at point {number:03d}; the same command goes on from there")
    bad = [row["point"] for row in rows if row["status"] not in ("done", "submitted")]
    failed = f", failed: {' '.join(bad)}" if bad else ""
    print(f"{'sweep':<8} {len(rows) - len(bad)} of {len(rows)} done{failed}   {folder / 'results.csv'}")
    emit(request, {"sweep": folder.name, "path": str(folder), "points": rows})
    return 1 if bad else 0


def split(tokens: list[str]) -> tuple[list[str], list[list[str]]]:
    """(settings that stay, for each swept key its ``key=value`` texts), in the order typed.

    What Hydra's grammar cannot read, such as a path with an apostrophe, is one value.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    fixed: list[str] = []
    axes: list[list[str]] = []
    for token in tokens:
        try:
            parsed = parser.parse_override(token)
        except HydraException:
            fixed.append(token)
            continue
        if not parsed.is_sweep_override():
            fixed.append(token)
        elif not parsed.is_discrete_sweep():
            raise ConfigError(f"'{token}': the basic sweeper takes comma lists, choice() and range()")
        else:
            key = parsed.get_key_element()
            axes.append([f"{key}={_unquoted(text)}" for text in parsed.sweep_string_iterator()])
    return fixed, axes


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("\\" + text[0], text[0])
    return text


def _composed(request: Request, fixed: list[str], points: list[list[str]]) -> dict[str, Request]:
    """The requests of the points that compose, by number; where none does, the first one's error."""
    swept = {token.partition("=")[0] for token in (*fixed, *points[0])}
    for key in MANAGED[:1]:
        if any(token.startswith(f"{key}=") for point in points for token in point):
            raise ConfigError(f"{key} cannot be swept; it names the sweep")
    if len(swept) < len(fixed) + len(points[0]):
        raise ConfigError("a key is given twice in this sweep")
    found: dict[str, Request] = {}
    failure: AlignlabError | None = None
    for number, point in enumerate(points):
        words = [*([request.target] if request.target else []), *fixed, *point]
        try:
            found[f"{number:03d}"] = make_request("train", words, request.settings)
        except AlignlabError as error:
            failure = failure or error
    if not found and failure is not None:
        raise failure
    return found


def _description(request: Request, fixed: list[str], points: list[list[str]]) -> str:
    lines = [f"file: {yamlio.scalar(None if request.file is None else str(request.file))}"]
    lines += ["settings:", *(f"  - {yamlio.scalar(token)}" for token in fixed)] if fixed else ["settings: []"]
    lines += ["points:", *(f'  "{number:03d}": {yamlio.scalar(point)}' for number, point in enumerate(points))]
    return "\n".join(lines) + "\n"


def _run_point(
    request: Request, folder: Path, number: int, fixed: list[str], point: list[str], reads: frozenset[str]
) -> dict[str, Any]:
    name = f"{number:03d}"
    kept = [token for token in fixed if token.partition("=")[0] not in MANAGED]
    target = [request.target] if request.target else []
    extra = [f"{key}={_text(value)}" for key, value in schema_items(request.settings) if key not in MANAGED]
    managed = [f"output_dir={folder}", f"run.name={name}"]
    command = [sys.executable, "-m", "alignlab", "train", *target, *extra, *kept, *point, *managed]
    print(f"{'point':<8} {name}  {' '.join(point)}", flush=True)
    read = {liveness.READ_BY_OTHERS: ",".join(sorted(reads))}
    code = call(command, read, stdout=2 if request.json is True else None)
    status = RunFolder(folder / name).status()
    state = status.get("state", "failed") if code == 0 else state_of(code)
    metrics = final_metrics(folder / name / "metrics.jsonl")
    return {"point": name, "status": state, "exit_code": code, "overrides": " ".join(point), **metrics}


def schema_items(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings from Python as dotted ones; a mapping below the second level is a value."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict) and not prefix:
            found += schema_items(value, f"{key}.")
        else:
            found.append((prefix + key, schema.plain(value)))
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else yamlio.scalar(value)


def final_metrics(path: Path) -> dict[str, float]:
    """The last value of every metric in a run's ``metrics.jsonl``; a line cut short by a kill is passed over."""
    found: dict[str, float] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        found.update({key: value for key, value in numbers.items() if math.isfinite(value)})
    for key in ("attempt", "time"):
        found.pop(key, None)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """``results.csv``: point, status, exit_code, overrides, then every metric that any point has."""
    columns = list(dict.fromkeys(itertools.chain(("point", "status", "exit_code", "overrides"), *rows)))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
