"""A rank's micro-batches of a step: packed in a background thread, handed over on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from alignlab.data.index import Index
from alignlab.data.pack import Prefetcher, pack, to_device
from alignlab.types import PackedBatch


class Loader:
    """Micro-batches of one index in one layout.

    ``values`` are numbers for every sequence of the index (reference log-probabilities), ``mismatched_values`` those
    of rows with a partner's completion, keyed (own, partner).
    """

    def __init__(
        self, index: Index, layout: str, device: torch.device, dtype: torch.dtype, rank: int, *,
        mixes_inputs: bool = False, pad_id: int = 0, merge_prompts: bool = False, max_length: int | None = None,
    ) -> None:  # fmt: skip
        self.index, self.device, self.rank = index, device, rank
        self.current: PackedBatch | None = None
        """the micro-batch at hand: handed over last, None when the pass is over"""
        self.waited = 0.0
        """seconds that the caller has waited for packing so far"""
        self.values: dict[str, np.ndarray] = {}
        self.mismatched_values: dict[str, Mapping[tuple[int, int], float]] = {}
        self._pack = partial(
            pack, index, layout=layout, mixes_inputs=mixes_inputs, pad_id=pad_id, dtype=dtype,
            merge_prompts=merge_prompts, max_length=max_length,
        )  # fmt: skip

    def current_text(self) -> str:
        """The rows of the current micro-batch, longest first: ``row-17 (812 tokens), ...``."""
        return "no row" if self.current is None else self.text_of(self.current.sequence_ids.cpu().numpy())

    def text_of(self, sequences: np.ndarray) -> str:
        """Sequences (stored numbers) by the ids of their rows, longest first: ``row-17 (812 tokens), ...``."""
        numbers = np.unique(sequences)
        numbers = numbers[np.argsort(-self.index.lengths[numbers], kind="stable")]
        named = zip(self._samples(numbers), self.index.lengths[numbers].tolist(), strict=True)
        shown = [f"{self.index.sample_id(sample)} ({length:,} tokens)" for sample, length in named]
        return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")

    def samples_of(self, batch: PackedBatch) -> list[int]:
        """Stored number of the sample that each sequence of a micro-batch belongs to."""
        return self._samples(batch.sequence_ids.cpu().numpy())

    def _samples(self, sequences: np.ndarray) -> list[int]:
        return (np.searchsorted(self.index.sample_ptr, sequences, side="right") - 1).tolist()

    def of(self, plan: Any, select: str = "main") -> Iterator[PackedBatch]:
        """This rank's micro-batches of ``plan``; ``select="mismatched"`` gives KTO's partner rows instead."""
        values = self.values if select == "main" else self.mismatched_values
        make = partial(self._pack, select=select, values=values)
        with Prefetcher(plan.for_rank(self.rank), make) as batches:
            asked = time.perf_counter()
            for batch in batches:
                self.waited += time.perf_counter() - asked
                self.current = batch
                yield to_device(batch, self.device)
                asked = time.perf_counter()
        self.current = None
