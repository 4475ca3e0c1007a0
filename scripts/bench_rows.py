"""Rows of a benchmark for both sides: the same conversations, in the order in which our plan takes them.

A row file of any format becomes two files.  ``native`` has the rows as they are (trees, several rated completions,
pairs, demonstrations), ``flat`` one row an example, in the order of the steps: a peer that reads it from the top sees
the same rows in the same step.  Rows that a side would shorten, split or drop are left out before anything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.config import DataConfig, ModelConfig
from alignlab.data.examples import prune, to_examples
from alignlab.data.formats import to_sample
from alignlab.data.index import Index
from alignlab.data.plan import StepPlans, permutation
from alignlab.data.prepare import prepare
from alignlab.data.rows import read_rows
from alignlab.data.sources import Needs
from alignlab.runs.job import make_encoder
from alignlab.types import Sample, Unit

SPARE = 4
"""So many times the examples that are wanted are looked at first (too long and faulty rows go), then twice as many."""


@dataclass(frozen=True)
class Entry:
    """One row: as it is, and as rows of one example each."""

    native: dict[str, Any]
    flat: list[dict[str, Any]]


@dataclass(frozen=True)
class Files:
    """The row files; ``left_out`` counts rows that were looked at and not taken."""

    native: Path
    flat: Path
    left_out: int


def unit_of(objective: str) -> Unit:
    """What the global batch of an objective counts."""
    return Unit.SEQUENCE if objective in ("sft", "ift") else Unit.PAIR


def make(
    path: Path, objective: str, model: Path, folder: Path, *, batch: int, steps: int, max_length: int, seed: int
) -> Files:
    """Write the files of ``steps`` optimizer steps of ``batch`` examples, and small ones for the warm-up beside them.

    Raises SystemExit where ``path`` has too few rows that both sides can train on whole.
    """
    unit, total = unit_of(objective), batch * steps
    folder.mkdir(parents=True)
    source, entries, looked, examples = entries_of(path, unit), [], 0, 0

    def index_of(some: list[Entry], name: str) -> Index:
        write(folder / name, [entry.native for entry in some])
        data = DataConfig(path=str(folder / name), max_length=str(max_length))
        _, encoder = make_encoder(ModelConfig(name_or_path=str(model)), data)
        return prepare(data, Needs(unit), encoder, seed=seed).index

    chosen, wanted, more = None, SPARE * total, True
    while chosen is None and more:
        more = False
        for entry in source:
            looked += 1
            if entry is not None:
                entries.append(entry)
                examples += len(entry.flat)
            if examples >= wanted:
                wanted, more = 2 * wanted, True
                break
        index = index_of(entries, "candidates.jsonl")
        ptr = index.example_ptr(unit)
        kept = {index.sample_id(row): int(ptr[row + 1] - ptr[row]) for row in index.rows.tolist()}
        whole = [entry for entry in entries if kept.get(entry.native["id"]) == len(entry.flat)]
        chosen = exactly(whole, total)
    if chosen is None:
        sizes = sorted({len(entry.flat) for entry in whole})
        raise SystemExit(
            f"{path}: {len(whole)} usable rows of {sizes} examples each cannot make {steps} steps of {batch} exactly"
        )
    final = index_of(chosen, "native.jsonl")
    plans = StepPlans(final, unit=unit, global_batch_size=batch, seed=seed, max_steps=steps)
    write(folder / "flat.jsonl", in_order(plans, {entry.native["id"]: entry for entry in chosen}))
    small = sorted(whole, key=lambda entry: len(json.dumps(entry.flat)))
    warm = next(small[:n] for n in range(1, len(small) + 1) if sum(len(e.flat) for e in small[:n]) >= batch)
    write(folder / "warm-native.jsonl", [entry.native for entry in warm])
    write(folder / "warm-flat.jsonl", [row for entry in warm for row in entry.flat][:batch])
    return Files(folder / "native.jsonl", folder / "flat.jsonl", looked - len(whole))


def entries_of(path: Path, unit: Unit) -> Iterator[Entry | None]:
    """Every row; None for one that a peer has no form for, or of which something would be dropped."""
    for number, row in enumerate(read_rows(str(path))):
        sample, lost = prune(to_examples(to_sample(row), unit))
        usable = sample.sequences and (sample.pairs or unit is Unit.SEQUENCE) and not lost
        if not usable or sample.tools or not all(is_one_turn(sequence) for sequence in sample.sequences):
            yield None
            continue
        name = f"row-{number}"
        flat = list(flattened(sample, unit, name))
        yield Entry({**row.value, "id": name} if unit is Unit.PAIR else flat[0], flat)


def is_one_turn(sequence: Any) -> bool:
    """Whether a sequence is a conversation with one answer at its end, the form every trainer knows."""
    turns = sequence.completion
    return isinstance(turns, list) and len(turns) == 1 and set(turns[0]) == {"role", "content"}


def flattened(sample: Sample, unit: Unit, name: str) -> Iterator[dict[str, Any]]:
    """A row for each example, with TRL's columns."""
    said = [(list(sequence.prompt or []), sequence.completion) for sequence in sample.sequences]
    if unit is Unit.SEQUENCE:
        if len(said) == 1:
            yield {"id": name, "prompt": said[0][0], "completion": said[0][1]}
        return
    for number, pair in enumerate(sample.pairs):
        (prompt, chosen), (_, rejected) = said[pair.chosen], said[pair.rejected]
        yield {"id": f"{name}-{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected}


def exactly(entries: list[Entry], total: int) -> list[Entry] | None:
    """Of the entries from the front some that hold ``total`` examples together, in their order; None if none do."""
    reached: dict[int, tuple[int, ...]] = {0: ()}
    for place, entry in enumerate(entries):
        for size, taken in list(reached.items()):
            reached.setdefault(size + len(entry.flat), (*taken, place))
        if total in reached:
            return [entries[i] for i in reached[total]]
    return None


def in_order(plans: StepPlans, entries: dict[str, Entry]) -> list[dict[str, Any]]:
    """The flat rows in the order in which the steps of ``plans`` take their examples."""
    ptr, found = plans.index.example_ptr(plans.unit), []
    for step in range(plans.total_steps):
        for example, sample in zip(*plans.examples(step), strict=True):
            found.append(entries[plans.index.sample_id(int(sample))].flat[int(example - ptr[sample])])
    return found


def for_our_plan(flat: Path, seed: int) -> Path:
    """A file of the same rows that our plan takes in the order in which they stand in ``flat``."""
    rows = flat.read_text(encoding="utf-8").splitlines()
    placed = dict(zip(permutation(len(rows), seed, 0).tolist(), rows, strict=True))
    target = flat.with_name(f"planned-{flat.name}")
    target.write_text("".join(f"{placed[place]}\n" for place in range(len(rows))), encoding="utf-8")
    return target


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
