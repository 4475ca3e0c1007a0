"""Where a step went wrong: which micro-batch, which of its sequences, which parameter's gradient.

Asked only of a step that is known to be bad, because the answer costs a second pass and waits for the device after
every micro-batch; ordinary steps check nothing but the global gradient norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignlab.engine.base import trainable
from alignlab.ops.segments import segment_sum
from alignlab.train.step import Batches, micro_losses
from alignlab.types import Ask, PackedBatch, Scores, StepContext


@dataclass(frozen=True)
class BadBatch:
    """A micro-batch of this rank whose loss, scores or gradient are not finite.

    ``number`` counts the rank's micro-batches of the step from 0.  ``values`` [S] are the sequences' summed
    log-probabilities or rewards (``kind`` says which), None where the objective asked for neither.  ``parameters`` are
    those whose gradient of this micro-batch is not finite; they are named where the loss is finite, since one that is
    not ruins all of them.
    """

    number: int
    batch: PackedBatch
    loss: float
    kind: str
    values: Tensor | None
    parameters: tuple[str, ...]


def locate(
    engine: Any, objective: Any, batches: Batches, plan: Any, context: StepContext, *, backward: bool
) -> list[BadBatch]:
    """This rank's bad micro-batches of a step (``backward``) or of an evaluation; updates nothing.

    Collective: all ranks call it, since forward passes of ZeRO-3 and backward passes are.  Empty where the second pass
    is finite, or was bad on other ranks only.
    """
    found = []
    score = _Listener(engine.score)
    with _gradients_watched(engine.module if backward else None) as flags, torch.set_grad_enabled(backward):
        passes = micro_losses(engine, objective, batches, plan, context, backward=backward, score=score)
        for number, (batch, _, loss) in enumerate(passes):
            kind, values = score.heard(batch)
            parameters = tuple(name for name, flag in flags.items() if flag.item())
            flags.clear()
            finite = bool(loss.isfinite())
            if batch.weight and not (finite and not parameters and (values is None or bool(values.isfinite().all()))):
                named = parameters if finite else ()
                found.append(BadBatch(number, batch, loss.item(), kind, values, named))
    if backward:
        engine.zero()
    return found


class _Listener:
    """A score function that remembers what the last call with a gradient-bearing answer said."""

    def __init__(self, score: Any) -> None:
        self._score = score
        self._last = Scores()

    def __call__(self, batch: PackedBatch, ask: Ask) -> Scores:
        scores = self._score(batch, ask)
        if scores.tokens is None:
            self._last = scores
        return scores

    def heard(self, batch: PackedBatch) -> tuple[str, Tensor | None]:
        """(``logp`` or ``reward``, [S]) of the call since the last time."""
        scores, self._last = self._last, Scores()
        if scores.rewards is not None:
            return "reward", scores.rewards.detach()
        if scores.logps is None:
            return "logp", None
        logps = scores.logps.detach()
        return "logp", segment_sum(logps[batch.seq_idx], batch.seq_of, batch.last.numel())


@contextmanager
def _gradients_watched(module: nn.Module | None) -> Iterator[dict[str, Tensor]]:
    """Flags of the parameters through which a gradient has come, True where its norm is not finite on this very rank.

    The hooks see each gradient before an engine reduces it over ranks.  The norm, because finite elements may have
    squares that overflow: then the step is bad all the same.
    """
    flags: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def look(gradient: Tensor) -> None:
            bad = ~torch.linalg.vector_norm(gradient, dtype=torch.float32).isfinite()
            flags[name] = flags[name] | bad if name in flags else bad

        return look

    handles = [] if module is None else [p.register_hook(watch(name)) for name, p in trainable(module)]
    try:
        yield flags
    finally:
        for handle in handles:
            handle.remove()
