"""What every objective shares: defaults for its declarations, and checks that turn into one-line errors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from alignlab.errors import ConfigError
from alignlab.ops.segments import segment_counts, segment_sum
from alignlab.types import LossOutput, PackedBatch, Score, StepContext, Unit


class BaseObjective:
    """Declarations of :class:`alignlab.types.Objective` with their usual values.

    A subclass names itself, gives a ``Config`` dataclass and writes ``__call__``.  ``hints`` maps keys that people
    bring from elsewhere to what to use here; the command line shows them beside "unknown key".
    """

    name: str
    Config: type
    units: tuple[Unit, ...] = (Unit.SEQUENCE,)
    example: Unit = Unit.SEQUENCE
    head: str = "lm"
    mixes_inputs: bool = False
    mismatched: bool = False
    stage: str | None = None
    """``cpsft`` | ``cpo``: its rows are conditioned (data.condition)"""
    hints: ClassVar[dict[str, str]] = {}

    needs_flag: str | None = None
    """a number of the pairs that has to be set on one training pair at least (``data.<name>`` sets it on all)"""

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    @property
    def needs_reference(self) -> bool:
        """Whether ``sequence_values["reference"]`` must be there."""
        return False

    @property
    def wants_statistics(self) -> bool:
        """Whether the loop has to run ``step_statistics`` before each step (one more pass, no gradients)."""
        return False

    def __call__(self, score: Score, batch: PackedBatch, context: StepContext) -> LossOutput:
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------
# Checks for ``Config.__post_init__``
# ---------------------------------------------------------------------------------------------------------------


def one_of(key: str, value: Any, allowed: Collection[Any]) -> None:
    """Refuse a value that is not in ``allowed``."""
    if value not in allowed:
        known = ", ".join("null" if a is None else str(a) for a in allowed)
        raise ConfigError(f"objective.{key}: '{value}' is none of {known}")


def within(key: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Refuse a number outside [low, high] (``open_low``: outside (low, high])."""
    if not (low <= value <= high) or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < 1e300 else "")
        raise ConfigError(f"objective.{key}: {value} must be {bounds}")


# ---------------------------------------------------------------------------------------------------------------
# Numbers of sequences
# ---------------------------------------------------------------------------------------------------------------


def num_targets(batch: PackedBatch, like: Tensor) -> Tensor:
    """[S]: how many targets each sequence has, in the type of ``like`` (at least 1, so that it may divide)."""
    return segment_counts(batch.seq_ptr).clamp(min=1).to(like.dtype)


def sequence_sums(values: Tensor, batch: PackedBatch) -> Tensor:
    """[S]: sum over each sequence's targets of ``values`` [M]."""
    return segment_sum(values, batch.seq_of, batch.last.numel())


def sequence_value(batch: PackedBatch, name: str, like: Tensor) -> Tensor:
    """[S]: a number attached to the sequences, in the type of ``like``."""
    return batch.sequence_values[name].to(like.dtype)


def pair_value(batch: PackedBatch, name: str, like: Tensor) -> Tensor:
    """[P]: a number attached to the pairs, in the type of ``like``."""
    return batch.pair_values[name].to(like.dtype)
