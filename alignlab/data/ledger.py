"""The ledger of a run: every supervised token accounted for, in columnar files (Parquet, zstd) that any tool reads.

``samples.parquet``, written while rows are prepared: one entry for each sample of the index, in its order (a row of a
weighted source and a row under several conditions are several samples), and one for each row that was dropped.
``steps-<first>-<last>.parquet``, written by rank 0 while a run trains: one entry for each optimizer step.  What a step
holds is a pure function of the index and the seed; the ledger is the record of what was done, not a prediction.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from alignlab.data.index import Index
from alignlab.data.masks import ROLES
from alignlab.data.plan import StepPlan
from alignlab.data.segments import Segments, columns_of
from alignlab.errors import StorageError
from alignlab.types import EncodedSample, Unit

SAMPLES_FILE = "samples.parquet"
STEPS_NAME = "steps"

SAMPLES = pa.schema(
    [
        pa.field("row", pa.int64()),  # which of the rows read, from 1; samples of one row share it
        pa.field("number", pa.int64()),  # stored number in the index; null: dropped
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("file", pa.string()),
        pa.field("line", pa.int64()),  # null for a row that could not be read
        pa.field("status", pa.string()),  # kept | dropped
        pa.field("reason", pa.string()),  # why it was dropped
        pa.field("detail", pa.string()),
        pa.field("lost", pa.map_(pa.string(), pa.int32())),  # parts left out of a kept row, with its first sample
        pa.field("sequences", pa.int32()),
        pa.field("examples", pa.int32()),  # pairs, or sequences where those are the examples
        pa.field("tokens", pa.int64()),
        pa.field("supervised", pa.int64()),  # tokens that are targets
        *(pa.field(f"role_{role}", pa.int64()) for role in ROLES),  # their sum is ``tokens``
        pa.field("hash", pa.uint64()),  # content_hash
    ]
)

STEPS = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("epoch", pa.float64()),
        pa.field("samples", pa.list_(pa.int32())),  # stored numbers, in the order of the stream
        pa.field("examples", pa.list_(pa.int32())),  # how many examples of each the step holds
        pa.field("tokens", pa.int64()),  # of the step's sequences, each with its own prompt
        pa.field("supervised", pa.int64()),  # targets of the step's sequences
        *(pa.field(f"unit_{unit.value}", pa.float64()) for unit in Unit),  # StepPlan.totals: the divisors
        pa.field("skipped", pa.bool_()),  # not finite: no update was made
        pa.field("hash", pa.binary(16)),  # step_hash
    ]
)

_ROW_GROUP = 8192
_BUFFERED = 1 << 20
"""Samples of recorded steps that are kept in memory at most (16 MB) before a segment is written."""


def content_hash(sample: EncodedSample) -> int:
    """64-bit BLAKE2b of all that a sample trains with (tokens, target mask, pairs, labels, weights), not its name."""
    digest = hashlib.blake2b(digest_size=8)
    for sequence in sample.sequences:
        digest.update(len(sequence.tokens).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(sequence.tokens, dtype="<i4").data)
        digest.update(np.ascontiguousarray(sequence.target, dtype="|b1").data)
    digest.update(np.ascontiguousarray(sample.pairs, dtype="<i4").tobytes())
    for kind, values in (("sequence", sample.sequence_values), ("pair", sample.pair_values)):
        for name in sorted(values):
            digest.update(f"{kind}/{name}\0".encode())
            digest.update(np.ascontiguousarray(values[name], dtype="<f4").tobytes())
    return int.from_bytes(digest.digest(), "little")


def step_hash(hashes: np.ndarray, offsets: np.ndarray) -> bytes:
    """128-bit BLAKE2b of a step's examples: the contents of their samples (uint64) and their places in them (int64).

    The examples are sorted first, so the order inside a step, which no gradient depends on, is not in it.
    """
    order = np.lexsort((offsets, hashes))
    examples = np.stack((hashes[order], offsets[order].astype(np.uint64)), axis=1)
    return hashlib.blake2b(np.ascontiguousarray(examples, dtype="<u8").data, digest_size=16).digest()


def stream_hash(hashes: Iterable[bytes]) -> str:
    """One value (hex) for a run's stream so far: the steps' hashes in order."""
    return hashlib.blake2b(b"".join(hashes), digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------


class SampleWriter:
    """Writes ``samples.parquet`` row group by row group, in constant memory.

    ``kept`` is told the samples of a row in the order in which they are added to the index.  ``place`` holds what is
    known of the row: ``file``, ``line``, ``id``, ``detail``.  As a context manager it closes the file.
    """

    def __init__(self, path: Path, unit: Unit) -> None:
        self._unit = unit
        self._writer = parquet.ParquetWriter(path, SAMPLES, compression="zstd")
        self._stored = 0
        self._clear()

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kept(
        self, row: int, place: Mapping[str, Any], samples: Sequence[EncodedSample], lost: Mapping[str, int]
    ) -> None:
        """A row that became ``samples``; ``lost`` are the parts of it that were left out, by reason."""
        before: tuple[EncodedSample, dict[str, Any]] | None = None
        for sample in samples:
            if before is None or sample is not before[0]:  # a copy (a weighted source) has the same account
                before = (sample, self._account(sample))
            parts = [] if not lost else list(lost.items())
            self._add(row, place, status="kept", number=self._stored, lost=parts, **before[1])
            lost = {}
            self._stored += 1

    def dropped(self, row: int, place: Mapping[str, Any], reason: str) -> None:
        """A row that was left out; its tokens were not counted."""
        zero = dict.fromkeys(("sequences", "examples", "tokens", "supervised", *(f"role_{r}" for r in ROLES)), 0)
        self._add(row, place, status="dropped", reason=reason, **zero)

    def close(self) -> None:
        """Write what is left, and the footer."""
        self._write()
        self._writer.close()

    def _account(self, sample: EncodedSample) -> dict[str, Any]:
        counts = np.zeros(len(ROLES), dtype=np.int64)
        for sequence in sample.sequences:
            roles = sequence.roles
            if roles is None:  # who speaks is not known
                counts[ROLES.index("other")] += len(sequence.tokens)
            else:
                counts += np.bincount(roles, minlength=len(ROLES))
        return {
            "id": sample.id,
            "source": sample.source,
            "sequences": len(sample.sequences),
            "examples": len(sample.pairs) if self._unit is Unit.PAIR else len(sample.sequences),
            "tokens": sum(len(sequence.tokens) for sequence in sample.sequences),
            "supervised": sum(int(sequence.target.sum()) for sequence in sample.sequences),
            **{f"role_{role}": int(count) for role, count in zip(ROLES, counts, strict=True)},
            "hash": content_hash(sample),
        }

    def _add(self, row: int, place: Mapping[str, Any], **values: Any) -> None:
        known = {"row": row, **place, **values}
        for name, column in self._columns.items():
            column.append(known.get(name))
        if len(self._columns["row"]) >= _ROW_GROUP:
            self._write()

    def _write(self) -> None:
        if self._columns["row"]:
            self._writer.write_table(pa.table(self._columns, schema=SAMPLES))
            self._clear()

    def _clear(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in SAMPLES.names}


# ---------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------


class StepLedger:
    """Records the steps of a run: rank 0 has one, which begins after ``step`` steps.

    ``account`` is the index's ``samples.parquet``; the folder gets it too (a hard link where that is possible), so
    that it outlives the cache.
    """

    def __init__(self, folder: Path, account: Path, index: Index, unit: Unit, step: int) -> None:
        self.folder, self.index, self.unit = folder, index, unit
        self._segments = Segments(folder, STEPS_NAME, STEPS)
        self._records: list[dict[str, Any]] = []
        self._buffered = 0
        numbers = columns_of(account, ["number", "hash"])
        # Not ``to_numpy``, which imports pandas: the first step would wait for it.
        self._hashes = np.from_dlpack(numbers["hash"].drop_null().combine_chunks())
        stored = len(index.sample_ptr) - 1
        if len(self._hashes) != stored:
            raise StorageError(
                f"{account}: {len(self._hashes)} samples where the index has {stored}; remove the index "
                "('alignlab cache rm index') and run again"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _place(account, folder / SAMPLES_FILE)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
        self._segments.cut(step)

    def record(self, plan: StepPlan, *, skipped: bool) -> None:
        """One step that was done; kept in memory until :meth:`flush`."""
        index, examples = self.index, plan.examples
        ptr = index.example_ptr(self.unit)
        samples = np.searchsorted(ptr, examples, side="right") - 1
        # A sample begins anew where its examples do: at the border of two epochs it may follow itself.
        begins = np.concatenate(([True], (np.diff(samples) != 0) | (np.diff(examples) <= 0)))
        firsts = np.flatnonzero(begins)
        self._records.append(
            {
                "step": plan.step + 1,
                "epoch": plan.epoch,
                "samples": samples[firsts].astype(np.int32),
                "examples": np.diff(np.append(firsts, len(examples))).astype(np.int32),
                "tokens": plan.num_tokens,
                "supervised": self._supervised(examples, samples, np.cumsum(begins)),
                **{f"unit_{unit.value}": total for unit, total in plan.totals.items()},
                "skipped": skipped,
                "hash": step_hash(self._hashes[samples], examples - ptr[samples]),
            }
        )
        self._buffered += len(firsts)
        if self._buffered >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write the steps recorded since the last time as one segment, durably."""
        if not self._records:
            return
        columns = {name: [record[name] for record in self._records] for name in STEPS.names}
        self._segments.write(pa.table(columns, schema=STEPS))
        self._records, self._buffered = [], 0

    def _supervised(self, examples: np.ndarray, samples: np.ndarray, visits: np.ndarray) -> int:
        """Targets of the step's sequences; pairs that share a sequence need it once in each visit of their sample."""
        index = self.index
        if self.unit is Unit.SEQUENCE:
            return int(index.num_targets[examples].sum())
        own = index.pairs[examples] + index.sample_ptr[samples][:, None]
        sequences = np.unique(own + visits[:, None] * index.num_sequences) % index.num_sequences
        return int(index.num_targets[sequences].sum())


def read_samples(folder: Path) -> pa.Table:
    """``samples.parquet`` of a run's ledger; StorageError where it is missing or damaged."""
    return columns_of(folder / SAMPLES_FILE)


def read_steps(folder: Path) -> pa.Table:
    """All recorded steps, by step; StorageError where a segment is damaged."""
    return Segments(folder, STEPS_NAME, STEPS).read()


def _place(source: Path, target: Path) -> None:
    """Make ``target`` hold what ``source`` holds, at once."""
    staged = target.with_name(f".{target.name}.tmp")
    staged.unlink(missing_ok=True)
    try:
        os.link(source, staged)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, staged)
    os.replace(staged, target)
    staged.unlink(missing_ok=True)  # renaming one link of a file onto another does nothing
