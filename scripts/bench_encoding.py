"""How fast rows become an index, on one core and on all, what memory that takes, and how fast the index opens again.

    python scripts/bench_encoding.py --objective sft --model smollm2 --data chats.jsonl.gz --rows 100000

The rows of ``--data`` are written over and over, each time under another number, until there are ``--rows`` of them.
They are then prepared as a run would, each time in a new process with an empty cache (``one core`` runs with the
affinity of one), and once more on the cache that is there.  Loading libraries and tokenizer is not counted; opening the
index is.  Memory is the highest resident one of the process and that of the largest process it started; Linux.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("one core", "all cores", "again")


def write_rows(source: Path, target: Path, count: int) -> None:
    """``count`` rows, no two of them equal: a number is put before the first text of each."""
    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with target.open("w", encoding="utf-8") as file:
        for number, row in zip(range(count), itertools.cycle(rows), strict=False):
            file.write(json.dumps({**numbered(row, number), "id": str(number)}) + "\n")


def numbered(value: Any, number: int) -> Any:
    """``value`` with a number before the first text of its first conversation, or of its first column."""
    if isinstance(value, dict) and "content" in value:
        return {**value, "content": f"{number}. {value['content']}"}
    if isinstance(value, dict):
        first = next(key for key, held in value.items() if key != "id" and isinstance(held, str | list))
        return {**value, first: numbered(value[first], number)}
    if isinstance(value, list):
        return [numbered(value[0], number), *value[1:]]
    return f"{number}. {value}"


def prepare_side(order: dict[str, Any]) -> dict[str, Any]:
    """One preparation in this process."""
    if order["cores"]:
        os.sched_setaffinity(0, order["cores"])
    from alignlab.configuration.compose import compose
    from alignlab.runs.job import make_encoder, prepare_data

    settings = {key: order[key] for key in ("model", "objective", "data")} | {"data.max_length": order["max_length"]}
    config = compose(values=settings).config
    make_encoder(config.model, config.data)  # what is loaded once, whatever the number of rows
    start = time.perf_counter()
    data = prepare_data(config)
    seconds = time.perf_counter() - start
    index = data.train.index
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    tokens = int(index.tree_tokens(False).sum())
    return {"seconds": seconds, "kept": len(index), "tokens": tokens, "peak_mib": [peak / 1024 for peak in peaks]}


def measure(given: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Every side's figures."""
    rows = scratch / "rows.jsonl"
    write_rows(given.data, rows, given.rows)
    cores = sorted(os.sched_getaffinity(0))
    found = {}
    for side in SIDES:
        order = {
            "model": given.model, "objective": given.objective, "data": str(rows), "max_length": given.max_length,
            "cores": cores[:1] if side == "one core" else cores,
        }  # fmt: skip
        cache = scratch / ("one" if side == "one core" else "all")
        environment = {**os.environ, "ALIGNLAB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--side", json.dumps(order)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, dict[str, Any]], rows: int) -> str:
    """Markdown."""
    lines = ["| | seconds | rows a second | tokens a second | memory MiB, and of a child |", "|---|---|---|---|---|"]
    for side, one in found.items():
        speeds = (f"{amount / one['seconds']:,.0f}" for amount in (rows, one["tokens"]))
        memory = ", ".join(f"{peak:,.0f}" for peak in one["peak_mib"])
        cells = (f"{one['seconds']:,.2f}", *(speeds if side != "again" else ("", "")), memory)
        lines.append(f"| {side} | {' | '.join(cells)} |")
    one, every = (found[side]["seconds"] for side in SIDES[:2])
    kept, tokens = (found["all cores"][key] for key in ("kept", "tokens"))
    said = f"{rows:,} rows, {kept:,} kept, {tokens:,} tokens; one core / all cores: {one / every:.2f}"
    return "\n".join([*lines, "", said])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="sft")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, help="rows in any format that alignlab reads, one JSON object a line")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        print(json.dumps(prepare_side(json.loads(given.side))))
        return
    if not given.data:
        parser.error("--data is needed")
    with tempfile.TemporaryDirectory(prefix="bench-encoding-") as scratch:
        print(table(measure(given, Path(scratch)), given.rows))


if __name__ == "__main__":
    main(sys.argv[1:])
