"""A world without a model: log-probabilities come from a table, so every formula can be written out beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.types import Ask, LossOutput, PackedBatch, Scores, StepContext


def make_batch(
    cells: Sequence[Sequence[int]],
    pairs: Sequence[tuple[int, int]] = (),
    depth: Sequence[Sequence[int]] | None = None,
    sequence_values: dict[str, Sequence[float]] | None = None,
    pair_values: dict[str, Sequence[float]] | None = None,
) -> PackedBatch:
    """A batch whose sequence s has the table's ``cells[s]`` as targets; cells may be shared between sequences."""
    used = sorted({cell for row in cells for cell in row})
    place = {cell: i for i, cell in enumerate(used)}
    counts = torch.tensor([len(row) for row in cells])
    none = torch.zeros(0, dtype=torch.long)
    depth = [range(len(row)) for row in cells] if depth is None else depth
    values = {"weight": [1.0] * len(cells), **(sequence_values or {})}
    pair_numbers = {"weight": [1.0] * len(pairs), **(pair_values or {})}
    return PackedBatch(
        input_ids=none, position_ids=none, attention_mask=None, plan=None,
        scored=torch.tensor(used), targets=torch.tensor(used), target_rows=torch.tensor(used),
        seq_ptr=torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))),
        seq_idx=torch.tensor([place[cell] for row in cells for cell in row]),
        seq_of=torch.repeat_interleave(torch.arange(len(cells)), counts),
        depth=torch.tensor([d for row in depth for d in row]),
        last=torch.arange(len(cells)),
        pairs=torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2),
        sequence_values={k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()},
        pair_values={k: torch.tensor(v, dtype=torch.float64) for k, v in pair_numbers.items()},
        sequence_ids=torch.arange(len(cells)),
        weight=1.0,
    )  # fmt: skip


class Table:
    """``score`` that reads log-probabilities (or rewards, by sequence id) from a leaf tensor."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.double().detach().requires_grad_()
        self.asked: list[Ask] = []

    def __call__(self, batch: PackedBatch, ask: Ask) -> Scores:
        self.asked.append(ask)
        if ask.want == "reward":
            return Scores(rewards=self.values[batch.sequence_ids])
        if ask.want in ("greedy", "sample"):
            return Scores(tokens=batch.targets + 1)
        return Scores(logps=self.values[batch.scored])


def context(**changes: Any) -> StepContext:
    given: dict[str, Any] = {"step": 0, "total_steps": 10, "warmup_steps": 4, "seed": 0, "totals": {}, **changes}
    return StepContext(**given)


def run_step(objective: Any, score: Table, batches: Sequence[PackedBatch], **changes: Any) -> tuple[Tensor, LossOutput]:
    """The sum over micro-batches of every unit's sum, with statistics gathered first, as the loop does it."""
    found = context(**changes)
    if objective.wants_statistics:
        with torch.no_grad():
            parts = [objective.step_statistics(score, batch, found) for batch in batches]
        changes["statistics"] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found = context(**changes)
    outputs = [objective(score, batch, found) for batch in batches]
    total = torch.stack([sum(output.sums.values(), torch.zeros(())) for output in outputs]).sum()
    return total, outputs[0]


@pytest.fixture
def batch_of() -> Callable[..., PackedBatch]:
    return make_batch


@pytest.fixture
def table() -> Callable[..., Table]:
    return lambda values: Table(torch.as_tensor(values, dtype=torch.float64))


@pytest.fixture
def step() -> Callable[..., tuple[Tensor, LossOutput]]:
    return run_step


@pytest.fixture
def at() -> Callable[..., StepContext]:
    return context
