"""By how much each pair's chosen side was preferred whenever the pair was trained on: the raw material of forensics.

The numbers are by-products of the steps: nothing is computed for them, they are collected on the device, gathered over
ranks when a line is logged, and written by rank 0 with the ledger, by the same rules (``data/segments.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from alignlab.data.index import Index
from alignlab.data.segments import Segments
from alignlab.types import LossOutput, PackedBatch

NAME = "margins"
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),  # the step that saw the pair, from 1; the margin is from before its update
        pa.field("sample", pa.int64()),  # stored number, as in the ledger's samples.parquet
        pa.field("chosen", pa.int32()),  # which of the sample's sequences
        pa.field("rejected", pa.int32()),
        pa.field("margin", pa.float32()),
    ]
)


class MarginRecorder:
    """Collects ``LossOutput.margins`` of the steps of one run.

    ``engine.gather`` is the only collective, in :meth:`gather`, which every rank calls at the same steps.  Only rank 0
    has a ``folder``; the others send what they have.
    """

    def __init__(self, engine: Any, folder: Path | None, index: Index, step: int) -> None:
        self._engine, self._index = engine, index
        self._segments = None if folder is None else Segments(folder, NAME, SCHEMA)
        self._numbers: list[Tensor] = []
        self._margins: list[Tensor] = []
        self._tables: list[pa.Table] = []
        if self._segments is not None:
            self._segments.cut(step)

    def add(self, step: int, batch: PackedBatch, output: LossOutput) -> None:
        """One micro-batch of the step with number ``step`` (from 1); a filler repeats pairs and is left out."""
        if output.margins is None or not batch.weight:
            return
        pairs = batch.sequence_ids[batch.pairs]
        self._numbers.append(torch.cat((torch.full_like(pairs[:, :1], step), pairs), dim=1))
        self._margins.append(output.margins.detach().float())

    def gather(self) -> None:
        """Bring all ranks' numbers to rank 0; collective."""
        device = self._engine.device
        numbers = torch.cat(self._numbers) if self._numbers else torch.zeros(0, 3, dtype=torch.int64, device=device)
        margins = torch.cat(self._margins) if self._margins else torch.zeros(0, device=device)
        self._numbers, self._margins = [], []
        numbers, margins = self._engine.gather(numbers.flatten()), self._engine.gather(margins)
        if self._segments is not None and len(margins):
            self._tables.append(self._table(numbers.view(-1, 3).cpu().numpy(), margins.cpu().numpy()))

    def flush(self) -> None:
        """Write what has been gathered since the last time; rank 0's part, durable when this returns."""
        if self._segments is not None and self._tables:
            self._segments.write(pa.concat_tables(self._tables))
            self._tables = []

    def _table(self, numbers: np.ndarray, margins: np.ndarray) -> pa.Table:
        step, chosen, rejected = numbers.T
        sample = np.searchsorted(self._index.sample_ptr, chosen, side="right") - 1
        first = self._index.sample_ptr[sample]
        order = np.lexsort((rejected - first, chosen - first, sample, step))  # whatever rank computed which pair
        columns = (step, sample, chosen - first, rejected - first, margins)
        arrays = [_array(column[order], field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        return pa.table(arrays, schema=SCHEMA)


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    # Not ``pa.array``, which imports pandas: the first line that is logged would wait for it.
    exact = np.ascontiguousarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(exact), [None, pa.py_buffer(exact)])


def read_margins(folder: Path) -> pa.Table:
    """All recorded margins, by step, of the run whose ledger is in ``folder``; empty where none were recorded."""
    return Segments(folder, NAME, SCHEMA).read()
