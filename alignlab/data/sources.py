"""Which rows a configuration names, and which of them stand on which side of its split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from alignlab.config import DataConfig, SourceConfig
from alignlab.data import world
from alignlab.data.formats import to_sample
from alignlab.data.grouping import grouped
from alignlab.data.overlap import prompt_of
from alignlab.data.rows import Row, RowError, read_rows
from alignlab.errors import DataError
from alignlab.types import Sample, Unit


@dataclass(frozen=True)
class Needs:
    """What an objective wants of the data."""

    example: Unit
    labels: bool = False
    """two labelled sequences a pair (KTO)"""
    stage: str | None = None
    """``cpsft`` | ``cpo``: rows are conditioned"""
    world_kind: str = "demonstrations"
    """which rows the built-in world makes"""


def holds_out(data: DataConfig) -> bool:
    """Whether rows are held out: in a file of their own, or a share of the training files."""
    return data.eval_path is not None or data.eval_fraction > 0


def sources_of(data: DataConfig, *, held_out: bool) -> list[SourceConfig]:
    """The files behind ``data.path`` / ``data.sources``, or behind ``data.eval_path``.

    With ``eval_fraction`` and no ``eval_path`` both sides read the training files and keep their share.
    """
    if held_out and data.eval_path is not None:
        return [_source(data, data.eval_path, data.eval_split)]
    if data.sources:
        return list(data.sources)
    if data.path is None:
        raise DataError("data is missing: data=<file.jsonl>, data=<hub name>, data=sums or data.sources=[{path: ...}]")
    return [_source(data, data.path, data.split)]


def _source(data: DataConfig, path: str, split: str) -> SourceConfig:
    shared = {name: getattr(data, name) for name in ("format", "absolute", "columns", "group_by", "rating")}
    return SourceConfig(path, 1.0, split, **shared)


def rows_of(
    source: SourceConfig, data: DataConfig, needs: Needs, *, held_out: bool,
    on_error: Callable[[RowError], None] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """The rows of one source: of a file, of a hub data set, or of the built-in world."""
    if source.path == "sums":
        options = dict(data.options)
        counts = {"train": int(options.pop("rows", 2000)), "test": int(options.pop("eval_rows", 200))}
        split = "test" if held_out and not split_share(data) else "train"
        # The held-out problems stay the same whatever the training rows' seed, so that runs can be compared.
        seeds = {"train": int(options.pop("seed", 0)), "test": int(options.pop("eval_seed", 0))}
        made = world.rows(options.pop("kind", needs.world_kind), counts[split], seeds[split], split, **options)
        return (Row("sums", number, value) for number, value in enumerate(made, 1))
    rows = read_rows(source.path, columns=source.columns, split=source.split, limit=data.limit, on_error=on_error)
    return rows if source.group_by is None else grouped(rows, source.group_by, on_error)


def sample_of(row: Row, source: SourceConfig) -> Sample:
    """What a row means, by its source's format; raises DataError at a row of the wrong schema (file, line, key)."""
    return to_sample(row, source.format, absolute=source.absolute)


def samples_of(data: DataConfig, needs: Needs, *, held_out: bool) -> Iterator[tuple[SourceConfig, Sample]]:
    """The rows of one side with their sources, in file order; raises DataError at the first that cannot be read."""
    for source in sources_of(data, held_out=held_out):
        for row in rows_of(source, data, needs, held_out=held_out):
            sample = sample_of(row, source)
            if not kept_apart(sample, data, held_out=held_out):
                yield source, sample


def kept_apart(sample: Sample, data: DataConfig, *, held_out: bool) -> bool:
    """Whether a row belongs to the other side of a split by ``data.eval_fraction`` (equal prompts stay together)."""
    share = split_share(data)
    return bool(share) and (_unit_interval("held-out", _prompt_key(sample)) < share) != held_out


def split_share(data: DataConfig) -> float:
    """The share of the training files that is held out; 0 where held-out rows have a file of their own."""
    return data.eval_fraction if data.eval_path is None else 0.0


def _unit_interval(*keys: object) -> float:
    digest = hashlib.blake2b(json.dumps(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _prompt_key(sample: Sample) -> str:
    """Text that equal prompts share (equal as :mod:`alignlab.data.overlap` has it: a leak cannot come of the split)."""
    first = sample.sequences[0]
    said = first.completion or ""
    prompt = prompt_of(first) or prompt_of(replace(first, prompt=said if isinstance(said, str) else said[:1]))
    return json.dumps(prompt or first.input_ids, sort_keys=True)


def repeats(source: SourceConfig, row: Row, seed: int) -> int:
    """How often a row of a weighted source is used: the whole part always, the fraction by a seeded draw."""
    whole = int(source.weight)
    return whole + (_unit_interval(seed, Path(row.file).name, row.line) < source.weight - whole)
