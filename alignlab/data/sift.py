"""Rows before they are encoded: read, adapted to what the objective eats, judged, and put under their conditions.

What can be said of a row without its tokens is said here; nothing is counted and nothing written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignlab.config import DataConfig, SourceConfig
from alignlab.data.condition import Conditioner
from alignlab.data.condition_preview import Change
from alignlab.data.encode_child import Outcome
from alignlab.data.examples import fault, only, prune, to_examples
from alignlab.data.overlap import Examples, Hashes, hashes
from alignlab.data.rows import Row, RowError
from alignlab.data.sources import Needs, kept_apart, repeats, rows_of, sample_of
from alignlab.data.template import Encoder
from alignlab.errors import AlignlabError, ConfigError, DataError
from alignlab.types import Sample

_NO_ROW = Row("", 0, {})


@dataclass
class Sifted:
    """A row on its way: what was found before it is encoded, and then what became of its samples.

    Instead of a row: an ``error`` that takes its place, or the error that is the ``last`` thing to come of a file.
    """

    row: Row = _NO_ROW
    sample: Sample | None = None
    error: RowError | None = None
    last: AlignlabError | None = None
    place: dict[str, Any] = field(default_factory=dict)
    drop: str | None = None
    repeats: int = 1
    examples: list[Hashes] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    """what each condition does, one a sample, where there are any"""
    samples: list[Sample] = field(default_factory=list)
    """to be encoded: the row, or the row under each of its conditions"""
    outcomes: list[Outcome] = field(default_factory=list)


class Sifter:
    """The rows of one side, one source at a time.  Examples that stand in ``without`` are left out (``leak``)."""

    def __init__(
        self, data: DataConfig, needs: Needs, encoder: Encoder, *, held_out: bool, seed: int,
        without: Examples | None = None,
    ) -> None:  # fmt: skip
        self.data, self.needs, self.encoder = data, needs, encoder
        self.held_out, self.seed, self.without = held_out, seed, without
        self.conditioner = Conditioner(data.condition, needs.stage) if needs.stage else None

    def rows(self, source: SourceConfig) -> Iterator[Sifted]:
        """Every row of this side in order, as far as it can be judged before it is encoded; errors have their turn."""
        errors: list[RowError] = []
        try:
            for row in rows_of(source, self.data, self.needs, held_out=self.held_out, on_error=errors.append):
                yield from (Sifted(error=error) for error in errors)
                errors.clear()
                try:
                    sample = sample_of(row, source)
                    wanted = sample if self.conditioner else self._adapted(sample, source)
                except DataError as error:
                    yield Sifted(error=placed(error, row))
                    continue
                try:
                    if not kept_apart(sample, self.data, held_out=self.held_out):
                        yield self._sift(row, source, wanted)
                except DataError as error:
                    yield Sifted(error=placed(error, row), sample=sample)
        except AlignlabError as error:
            yield Sifted(last=error)
        yield from (Sifted(error=error) for error in errors)

    def _adapted(self, sample: Sample, source: SourceConfig) -> Sample:
        return to_examples(
            sample, self.needs.example, labels=self.needs.labels, absolute=source.absolute, by=source.rating
        )

    def _sift(self, row: Row, source: SourceConfig, sample: Sample) -> Sifted:
        """What is to be encoded of a row; DataError where it is of the wrong schema."""
        found = Sifted(row=row, sample=sample, place={"file": row.file, "line": row.line, "id": sample.id})
        found.repeats = repeats(source, row, self.seed)
        reason = fault(sample, self.encoder.markup)
        if reason or not found.repeats:
            found.drop = reason or "not_drawn"
            return found
        pruned, found.lost = prune(sample, self.encoder.markup)
        found.examples = hashes(pruned)
        if self.without is not None:
            at = self.without.stand_in(np.array([one.example for one in found.examples], dtype=np.uint64))
            if (at >= 0).any():
                leaks = at[at >= 0].tolist()
                found.place["other"] = self.without.place(leaks[0])
                found.lost["leak"] = len(leaks)
                if len(leaks) == len(found.examples):
                    found.drop = "leak"
                    return found
                sound = np.flatnonzero(at < 0).tolist()
                pruned, found.examples = only(pruned, sound), [found.examples[i] for i in sound]
        found.samples = [pruned]
        if self.conditioner:
            try:
                found.samples = [self._adapted(one, source) for one in self.conditioner.rows(pruned)]
            except ConfigError as error:  # a rating's name or level that cannot be written as a condition
                raise DataError(str(error)) from None
            found.changes = [self.conditioner.changes[one.id] for one in found.samples]
            if not found.samples and (detail := self.conditioner.unrated(pruned)):
                found.details["no_dimension"] = detail
        return found


def placed(error: DataError, row: Row) -> RowError:
    """``error`` as one of a row of the wrong schema, unless it is known for what it is."""
    if isinstance(error, RowError):
        return error
    detail = str(error).removeprefix(f"{row.file}: line {row.line}: ")
    return RowError(row.file, row.line, "wrong_schema", detail, byte=row.byte)
