"""A rank's micro-batches of a step: packed in a background thread, handed over on the device.

The index is memory-mapped and never written, so any thread may read it.  Packing is NumPy on one core: several threads
wait their turn, and none of them starts torch's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from alignlab.data.bins import Bin
from alignlab.data.index import Index
from alignlab.data.pack import Prefetcher, pack, pinned, to_device
from alignlab.types import PackedBatch


class Loader:
    """Micro-batches of one index in one layout.

    ``values`` are numbers for every sequence of the index (reference log-probabilities), ``mismatched_values`` those
    of rows with a partner's completion, keyed (own, partner).  ``form`` is that of the attention plans, one of
    ``data.pack.FORMS``.
    """

    def __init__(
        self, index: Index, layout: str, device: torch.device, dtype: torch.dtype, rank: int, *,
        mixes_inputs: bool = False, pad_id: int = 0, merge_prompts: bool = False, max_length: int | None = None,
        form: str = "padded",
    ) -> None:  # fmt: skip
        self.index, self.device, self.rank, self.form = index, device, rank, form
        self.current: PackedBatch | None = None
        """the micro-batch at hand: handed over last, None when the pass is over"""
        self.waited = 0.0
        """seconds that the caller has waited for step plans and packing so far"""
        self.values: dict[str, np.ndarray] = {}
        self.mismatched_values: dict[str, Mapping[tuple[int, int], float]] = {}
        self._pack_bin = partial(
            pack, index, layout=layout, mixes_inputs=mixes_inputs, pad_id=pad_id, dtype=dtype,
            merge_prompts=merge_prompts, max_length=max_length, form=form,
        )  # fmt: skip
        self._one_at_a_time = threading.Lock()
        self._begun: list[tuple[Any, str, Prefetcher[Bin, PackedBatch]]] = []

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
        place = next((i for i, one in enumerate(self._begun) if one[0] is plan and one[1] == select), None)
        with self._packing(plan, select) if place is None else self._begun.pop(place)[2] as batches:
            asked = time.perf_counter()
            for batch in batches:
                self.waited += time.perf_counter() - asked
                self.current = batch
                yield to_device(batch, self.device)
                asked = time.perf_counter()
        self.current = None

    def begin(self, plan: Any, select: str = "main") -> None:
        """Pack the first micro-batches of a pass now, for :meth:`of` to find; until then they stay in memory."""
        self._begun.append((plan, select, self._packing(plan, select)))

    def close(self) -> None:
        """Stop what was begun and never asked for."""
        while self._begun:
            self._begun.pop()[2].close()

    def _packing(self, plan: Any, select: str) -> Prefetcher[Bin, PackedBatch]:
        values = self.values if select == "main" else self.mismatched_values

        def make(bin: Bin) -> PackedBatch:
            with self._one_at_a_time:
                batch = self._pack_bin(bin, select=select, values=values)
            return pinned(batch) if self.device.type == "cuda" else batch

        return Prefetcher(plan.for_rank(self.rank), make)


class Ahead:
    """The plans of a run, whose next one is made, and its first micro-batches packed, while the current step computes.

    ``passes`` are the selections of rows that a step goes over, in order.  Nothing else depends on them: a plan that
    was not foreseen is made when it is asked for.  An error in the background is raised where the plan or the
    micro-batch that it prevented is asked for.  Use it as a context manager: it leaves no thread behind.
    """

    def __init__(self, plans: Any, loader: Loader, passes: Sequence[str] = ("main",)) -> None:
        self._plans, self._loader, self._passes = plans, loader, tuple(passes)
        self._next: tuple[int, Prefetcher[int, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plans, name)

    def at(self, step: int) -> Any:
        """The plan of step ``step``; the one behind it is begun."""
        asked = time.perf_counter()
        foreseen = self._next[1] if self._next is not None and self._next[0] == step else None
        plan = self._made(step) if foreseen is None else next(iter(foreseen))
        self._loader.waited += time.perf_counter() - asked
        self._stop_planning()
        if step + 1 < self._plans.total_steps:
            self._next = (step + 1, Prefetcher([step + 1], self._made))
        return plan

    def _made(self, step: int) -> Any:
        plan = self._plans.at(step)
        for select in self._passes:
            self._loader.begin(plan, select)
        return plan

    def _stop_planning(self) -> None:
        if self._next is not None:
            self._next[1].close()
            self._next = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_planning()
        self._loader.close()
