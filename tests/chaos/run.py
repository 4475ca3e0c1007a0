"""Run chaos shards; results go, one JSON object a case, to the end of one file, so that any sitting goes on from there.

    python tests/chaos/run.py --results chaos.jsonl [SHARD ...]     cases that have not passed yet
    python tests/chaos/run.py --results chaos.jsonl --summary       the table

A shard is a file ``shard_<name>.py`` beside this one with ``cases() -> list[Case]``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@dataclass(frozen=True)
class Case:
    """One trial.  ``run(harness)`` returns facts for the record (JSON) or raises; ``id`` is unique in its shard."""

    id: str
    run: Callable[[Any], dict[str, Any] | None]


def shard_names() -> list[str]:
    """All shards, by name."""
    return sorted(path.stem.removeprefix("shard_") for path in HERE.glob("shard_*.py"))


def cases_of(shard: str) -> list[Case]:
    """The cases of one shard."""
    found: list[Case] = importlib.import_module(f"shard_{shard}").cases()
    if len({case.id for case in found}) != len(found):
        raise ValueError(f"shard {shard}: two cases have the same id")
    return found


def read(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last record of every case."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if results.exists():
        for line in results.read_text().splitlines():
            record = json.loads(line)
            found[record["shard"], record["case"]] = record
    return found


def run_case(harness: Any, shard: str, case: Case) -> dict[str, Any]:
    """Its record: ``ok``, seconds, facts, or the error."""
    begun = time.perf_counter()
    record: dict[str, Any] = {"shard": shard, "case": case.id}
    try:
        record |= {"ok": True, "facts": case.run(harness) or {}}
    except Exception as error:
        text = "".join(traceback.format_exception_only(error)).strip()
        record |= {"ok": False, "error": text[-1500:]}
    return {**record, "seconds": round(time.perf_counter() - begun, 2), "time": time.time()}


def sitting(shards: list[str], results: Path, limit: int | None, seconds: float | None, keep: Path | None) -> bool:
    """Run what has not passed yet; whether all that ran passed."""
    from harness import Harness

    good, number, begun = True, 0, time.monotonic()
    for shard in shards:
        known = read(results)
        todo = [case for case in cases_of(shard) if not known.get((shard, case.id), {}).get("ok")]
        if not todo:
            continue
        with tempfile.TemporaryDirectory(dir=keep) as folder, Harness(Path(folder)) as harness:
            for case in todo:
                late = seconds is not None and time.monotonic() - begun > seconds
                if late or (limit is not None and number >= limit):
                    return good
                record = run_case(harness, shard, case)
                number += 1
                good &= record["ok"]
                with results.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
                outcome = "ok" if record["ok"] else "FAILED"
                print(f"{shard:<12} {case.id:<44} {outcome} {record['seconds']} s", flush=True)
                if not record["ok"]:
                    print(record["error"], flush=True)
                for path in harness.folder.glob("*-[0-9][0-9][0-9][0-9]"):
                    shutil.rmtree(path, ignore_errors=True)
    return good


def summary(results: Path) -> str:
    """One line a shard: passed of all, seconds, kills where a case holds several."""
    known, lines = read(results), [f"{'shard':<14} {'passed':>12}  {'seconds':>8}  {'kills':>5}"]
    for shard in shard_names():
        ids = [case.id for case in cases_of(shard)]
        records = [known[shard, i] for i in ids if (shard, i) in known]
        passed = sum(record["ok"] for record in records)
        seconds = sum(record["seconds"] for record in records)
        # A case may hold several kills; only those of a case that passed count.
        kills = sum(record.get("facts", {}).get("kills", 0) for record in records)
        lines.append(f"{shard:<14} {passed:>5} of {len(ids):>3}  {seconds:>8.0f}  {kills or '':>5}")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="*", help=f"of {', '.join(shard_names())} (default: all)")
    parser.add_argument("--results", type=Path, default=Path("chaos.jsonl"))
    parser.add_argument("--limit", type=int, help="at most so many cases in this sitting")
    parser.add_argument("--seconds", type=float, help="start no case after so many seconds")
    parser.add_argument("--folder", type=Path, help="where the runs' folders are made (default: the system's)")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.shards) - set(shard_names()):
        parser.error(f"no such shard: {', '.join(sorted(unknown))}")
    if options.summary:
        print(summary(options.results))
        return 0
    good = sitting(options.shards or shard_names(), options.results, options.limit, options.seconds, options.folder)
    print(summary(options.results))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
