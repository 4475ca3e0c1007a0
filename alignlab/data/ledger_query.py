"""Questions to the ledger of a run: which samples made a step, how often was a sample seen, where do two streams part.

A *sample* here is what a row became under one condition: the copies that a weighted source makes of it are one sample,
seen as often as all of them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alignlab.data.ledger import read_samples, read_steps, stream_hash
from alignlab.data.masks import ROLES
from alignlab.errors import ConfigError

SHOWN = ("id", "source", "file", "line", "tokens", "supervised")


@dataclass(frozen=True)
class Parting:
    """Where two streams part: the first step that is not the same, and the samples that only one side's step has."""

    step: int
    only: tuple[list[dict[str, Any]], list[dict[str, Any]]]


class Ledger:
    """What stands in the ledger folder of one run; StorageError where a file is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.samples: pa.Table = read_samples(folder)
        self.steps: pa.Table = read_steps(folder)

    @cached_property
    def numbers(self) -> np.ndarray:
        """int64 [steps]: the recorded steps, ascending."""
        return self.steps["step"].to_numpy()

    @property
    def missing(self) -> list[int]:
        """Steps below the last one that are not recorded (done elsewhere, where a run began from a checkpoint)."""
        last = int(self.numbers[-1]) if len(self.numbers) else 0
        return np.setdiff1d(np.arange(1, last + 1), self.numbers).tolist()

    @property
    def stream(self) -> str:
        """The hash of the stream so far."""
        return stream_hash(self.steps["hash"].to_pylist())

    @cached_property
    def kept(self) -> pa.Table:
        """The entries of the index's samples; entry i has the stored number i."""
        return self.samples.filter(pc.is_valid(self.samples["number"])).combine_chunks()

    @cached_property
    def _visits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(stored sample, its examples, place of the step in ``steps``), one entry for each sample of each step."""
        if not len(self.steps):
            return tuple(np.zeros(0, dtype=np.int64) for _ in range(3))  # type: ignore[return-value]
        samples = self.steps["samples"].combine_chunks()
        examples = pc.list_flatten(self.steps["examples"].combine_chunks())
        return tuple(  # type: ignore[return-value]
            column.to_numpy() for column in (pc.list_flatten(samples), examples, pc.list_parent_indices(samples))
        )

    @cached_property
    def _distinct(self) -> np.ndarray:
        """int64 [stored]: the sample that each stored one is a copy of; copies follow one another in an index."""
        rows, hashes = self.kept["row"].to_numpy(), self.kept["hash"].to_numpy()
        new = np.ones(len(rows), dtype=bool)
        new[1:] = (rows[1:] != rows[:-1]) | (hashes[1:] != hashes[:-1])
        return np.cumsum(new) - 1

    @cached_property
    def times_seen(self) -> np.ndarray:
        """float64 [stored]: how often the sample of each stored one was seen: examples of it in steps / its examples.

        A sample cut by the border of two steps is seen in both of them, and once.
        """
        samples, examples, _ = self._visits
        seen = np.bincount(samples, weights=examples, minlength=len(self.kept)) / self.kept["examples"].to_numpy()
        return np.bincount(self._distinct, weights=seen)[self._distinct] if len(seen) else seen

    def summary(self) -> dict[str, Any]:
        """The account of the whole run, as JSON."""
        samples, kept, steps = self.samples, self.kept, self.steps
        first = np.unique(self._distinct, return_index=True)[1]
        seen = self.times_seen[first]
        dropped = samples.filter(pc.equal(samples["status"], "dropped"))
        rows = len(np.unique(kept["row"].to_numpy()))
        quantiles = [float(f(seen)) for f in (np.min, np.median, np.max)] if len(seen) else [0.0] * 3
        return {
            "steps": len(steps),
            "last_step": int(self.numbers[-1]) if len(self.numbers) else 0,
            "missing_steps": self.missing,
            "skipped_steps": steps.filter(steps["skipped"])["step"].to_pylist(),
            "stream": self.stream,
            "rows": {
                "read": rows + len(dropped),
                "kept": rows,
                "dropped": dict(sorted(Counter(dropped["reason"].to_pylist()).items())),
            },
            "samples": {"stored": len(kept), "distinct": len(seen), "seen": int((seen > 0).sum())},
            "times_seen": dict(zip(("min", "median", "max"), quantiles, strict=True)),
            "tokens": _total(kept, "tokens"),
            "supervised": _total(kept, "supervised"),
            "roles": {role: total for role in ROLES if (total := _total(kept, f"role_{role}"))},
            "tokens_in_steps": _total(steps, "tokens"),
            "supervised_in_steps": _total(steps, "supervised"),
        }

    def step(self, number: int) -> dict[str, Any]:
        """A step's entry with its samples, each with how many of its examples the step holds; ConfigError: no entry."""
        place = int(np.searchsorted(self.numbers, number))
        if place == len(self.numbers) or self.numbers[place] != number:
            held = f"which holds {self.numbers[0]} to {self.numbers[-1]}" if len(self.numbers) else "which holds none"
            raise ConfigError(f"step {number} is not in the ledger, {held}")
        entry = self.steps.slice(place, 1).to_pylist()[0]
        counts = entry.pop("examples")
        found = [
            {**self._shown(sample), "examples": examples}
            for sample, examples in zip(entry["samples"], counts, strict=True)
        ]
        return {**entry, "hash": entry["hash"].hex(), "examples": sum(counts), "samples": found}

    def sample(self, name: str) -> list[dict[str, Any]]:
        """What became of the samples and dropped rows called ``name``: an id, or FILE:LINE; ConfigError: no such one.

        Copies are one entry.  ``steps`` are those that held an example of it.
        """
        table = self.samples
        entries = table.filter(self._called(name)).to_pylist()
        if not entries:
            known = ", ".join(repr(one) for one in table["id"].slice(0, 3).to_pylist())
            raise ConfigError(f"no sample '{name}' in the ledger; give an id (such as {known}), or FILE:LINE")
        found: dict[tuple[int, int | None], dict[str, Any]] = {}
        visited, _, places = self._visits
        for entry in entries:
            number = entry.pop("number")
            one = found.setdefault((entry["row"], entry["hash"]), {**_plain(entry), "copies": 0})
            if number is not None:
                one["copies"] += 1
                one["times_seen"] = float(self.times_seen[number])
                steps = {*one.get("steps", ()), *self.numbers[places[visited == number]].tolist()}
                one["steps"] = sorted(steps)
        return list(found.values())

    def _called(self, name: str) -> pa.ChunkedArray:
        table = self.samples
        called = pc.equal(table["id"], name)
        file, _, line = name.rpartition(":")
        if not pc.any(called).as_py() and file and line.isdigit():
            names = table["file"]
            here = pc.or_(pc.equal(names, file), pc.ends_with(names, f"/{file}"))
            called = pc.and_(here, pc.equal(table["line"], int(line)))
        return pc.fill_null(called, False)

    def _shown(self, number: int) -> dict[str, Any]:
        entry = self.kept.select([*SHOWN, "hash"]).slice(number, 1).to_pylist()[0]
        return {**entry, "hash": f"{entry['hash']:016x}"}


def parting(one: Ledger, other: Ledger) -> Parting | None:
    """Where the streams of two runs part, over the steps that both have; None where they do not."""
    steps, mine, its = np.intersect1d(one.numbers, other.numbers, return_indices=True)
    hashes = (one.steps["hash"].take(mine).to_pylist(), other.steps["hash"].take(its).to_pylist())
    for step, first, second in zip(steps.tolist(), *hashes, strict=True):
        if first != second:
            left, right = one.step(step)["samples"], other.step(step)["samples"]
            return Parting(step, (_without(left, right), _without(right, left)))
    return None


def _without(samples: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples whose content and number of examples the others do not have."""
    held = Counter((one["hash"], one["examples"]) for one in others)
    found = []
    for one in samples:
        key = (one["hash"], one["examples"])
        if held[key]:
            held[key] -= 1
        else:
            found.append(one)
    return found


def _total(table: pa.Table, name: str) -> int:
    return pc.sum(table[name], min_count=0).as_py()


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of ``samples`` as JSON: roles together, without what is not known."""
    made = {name: value for name, value in entry.items() if value is not None and not name.startswith("role_")}
    if "hash" in made:
        made["hash"] = f"{made['hash']:016x}"
    made["lost"] = dict(made.pop("lost", ()))
    made["roles"] = {role: entry[f"role_{role}"] for role in ROLES if entry[f"role_{role}"]}
    return made
