"""The algebra of statistics: add, stack into one tensor, finish as total / weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alignlab.types import Stat


def stat(values: Tensor, weights: Tensor | None = None) -> Stat:
    """The statistic whose finished value is the weighted mean of ``values`` (any shape), detached."""
    values = values.detach()
    if weights is None:
        weights = torch.ones_like(values)
    return Stat((values * weights).sum(), weights.sum().to(values.dtype))


class Meter:
    """Sums statistics over micro-batches; every device keeps its own until one reduction a log interval."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: Mapping[str, Stat], weight: float = 1.0) -> None:
        """Add one micro-batch's statistics; a filler has weight 0 and leaves no trace."""
        for name, (total, count) in stats.items():
            entry = torch.stack((total.detach().double(), count.detach().double())) * weight
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def merge(self, other: Meter) -> None:
        """Add another meter's sums."""
        for name, entry in other._sums.items():
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def stacked(self, names: list[str], device: torch.device) -> Tensor:
        """float64 [len(names), 2]; a name this device never saw is zero."""
        zero = torch.zeros(2, dtype=torch.float64, device=device)
        return torch.stack([self._sums.get(name, zero) for name in names]) if names else zero.new_zeros((0, 2))

    @property
    def names(self) -> list[str]:
        return sorted(self._sums)

    def reset(self) -> None:
        self._sums = {}


def finish(names: list[str], sums: Tensor) -> dict[str, float]:
    """``{name: total / weight}`` of a reduced ``stacked`` tensor; names without weight are left out."""
    return {name: total / weight for name, (total, weight) in zip(names, sums.tolist(), strict=True) if weight != 0}
