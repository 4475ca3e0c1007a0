"""What a training will do, before it does it: micro-batches, tokens, floating point work.

Nothing is estimated that can be counted.  Steps come from the plan that training follows, a pure function of the index
and the configuration; they are packed as training packs them; and the objective itself is run on them with scores that
are made up, so that every pass it makes over the model is counted, by the same arithmetic that logs MFU.  Of a long run
a seeded sample of steps is counted, and sums over the run are the sample's mean times the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from alignlab.config import RootConfig
from alignlab.data.index import Index
from alignlab.data.loader import Loader
from alignlab.data.plan import StepPlan, StepPlans, sequential
from alignlab.errors import ConfigError
from alignlab.metrics import Meter
from alignlab.models.flops import PEAKS, Counted, ModelFlops
from alignlab.train.loop import Progress, context_of
from alignlab.train.single import ScoreEngine
from alignlab.train.step import accumulate, with_statistics
from alignlab.types import Ask, LossOutput, PackedBatch, Score

MADE_UP = -8.0
"""The reference log-probability of every sequence here; no count depends on it."""


class StepWork(NamedTuple):
    """One optimizer step, over all ranks."""

    micro_batches: int
    """of one rank, fillers included"""
    tokens: int
    """of its sequences, each with its own prompt: what ``num_tokens`` counts"""
    computed: int
    """that stand in its micro-batches, padding included and fillers left out"""
    scored: int
    """rows that go through the output layer"""
    largest: int
    """tokens of its largest micro-batch, a mismatched pass counted"""
    filler_share: float
    imbalance: float
    flops: float
    """forward and backward passes, and those without gradients that the objective makes besides"""
    reference_flops: float
    """KTO's rows with another row's answer, which the reference scores once"""


class Estimate(NamedTuple):
    """A sum over all steps; ``error`` is its standard error, 0 where every step was counted."""

    total: float
    error: float


@dataclass(frozen=True)
class Work:
    """Steps that were counted, of all there are."""

    total_steps: int
    planned: list[int]
    """0-based; all steps, or a sample"""
    steps: list[StepWork]
    epochs: float
    reference: Estimate
    """flops of the reference pass over all rows; 0 for an objective without one"""

    @property
    def complete(self) -> bool:
        """Whether every step was counted."""
        return len(self.planned) == self.total_steps

    def mean(self, name: str) -> float:
        return float(np.mean([getattr(step, name) for step in self.steps]))

    def most(self, name: str) -> float:
        return max(getattr(step, name) for step in self.steps)

    def total(self, name: str) -> Estimate:
        """The sum over the run.  The last step, which may be smaller than the others, is always counted."""
        values = np.array([getattr(step, name) for step in self.steps], dtype=np.float64)
        if self.complete:
            return Estimate(float(values.sum()), 0.0)
        *others, last = values
        return _scaled(np.array(others), self.total_steps - 1, last)


def _scaled(values: np.ndarray, population: int, apart: float = 0.0) -> Estimate:
    """The sum over ``population`` things of which ``values`` are a sample, and of one apart."""
    missing = 1 - len(values) / population
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    error = population * deviation * math.sqrt(max(missing, 0.0) / len(values))
    return Estimate(float(values.mean()) * population + apart, error)


def choose_steps(total: int, most: int, seed: int) -> list[int]:
    """Up to ``most`` steps (0: all), in order; the last one is among them."""
    if not most or total <= most:
        return list(range(total))
    chosen = np.random.default_rng(seed).choice(total - 1, size=max(1, most - 1), replace=False)
    return [*sorted(chosen.tolist()), total - 1]


class Counter:
    """Counts steps of a job that nobody has started.

    ``score`` answers the objective's questions with made-up numbers; ``flops`` is the shape that trains, and
    ``reference_flops`` the reference's.
    """

    def __init__(
        self, config: RootConfig, objective: Any, index: Index, plans: StepPlans, flops: ModelFlops,
        reference_flops: ModelFlops, max_length: int | None, score: Score,
    ) -> None:  # fmt: skip
        self._config, self._objective, self._plans = config, objective, plans
        self._flops, self._reference_flops, self._score = flops, reference_flops, score
        limits = plans.limits
        self._loader = Loader(
            index, limits.layout, torch.device("cpu"), torch.float64, 0, mixes_inputs=limits.mixes_inputs,
            merge_prompts=limits.merge_prompts, max_length=max_length, form="ragged",
        )  # fmt: skip
        self._loader.values["reference"] = np.full(index.num_sequences, MADE_UP)

    def count(self, most: int) -> Work:
        """Up to ``most`` steps (0: all) and, where the objective needs one, as many micro-batches of the reference."""
        total = self._plans.total_steps
        planned = choose_steps(total, most, self._config.seed)
        steps = [self._step(step) for step in planned]
        work = Work(total, planned, steps, self._plans.at(total - 1).epoch, Estimate(0.0, 0.0))
        if not self._objective.needs_reference:
            return work
        main, mismatched = self._reference(most), work.total("reference_flops")
        error = math.hypot(main.error, mismatched.error)
        return replace(work, reference=Estimate(main.total + mismatched.total, error))

    def _step(self, step: int) -> StepWork:
        plan = self._plans.at(step)
        alone = _on_one_rank(plan)
        counted = Counted(self._score, self._flops, torch.device("cpu"))
        engine = ScoreEngine(counted)
        reference, computed, scored, largest = 0.0, 0, 0, 0
        if self._objective.mismatched:
            pairs = map(tuple, plan.mismatched_pairs().tolist())
            self._loader.mismatched_values["reference"] = dict.fromkeys(pairs, MADE_UP)
            reference, largest = self._forward(self._loader.of(alone, select="mismatched"))

        def tally(batch: PackedBatch, output: LossOutput) -> None:
            nonlocal computed, scored, largest
            computed += batch.input_ids.numel()
            scored += (batch.last if self._objective.head == "scalar" else batch.scored).numel()
            largest = max(largest, batch.input_ids.numel())

        context = context_of(self._plans, plan, step, self._config.optim, self._config.seed, Progress())
        context = with_statistics(engine, self._objective, self._loader, alone, context)
        # Nothing is computed with the gradients; whether they are recorded says what a pass costs.
        accumulate(engine, self._objective, self._loader, alone, context, Meter(), backward=False, observe=tally)
        return StepWork(
            len(plan.bins) // plan.dp, plan.num_tokens, computed, scored, largest, plan.filler_share, plan.imbalance,
            counted.total.item(), reference,
        )  # fmt: skip

    def _reference(self, most: int) -> Estimate:
        """The pass over all rows.  Its micro-batches are much alike: filled one after the other to the same budget."""
        limits = self._plans.limits
        plan = sequential(
            self._loader.index, unit=self._plans.unit, token_budget=limits.token_budget, layout=limits.layout,
            mixes_inputs=limits.mixes_inputs, merge_prompts=limits.merge_prompts, cost=limits.cost,
        )  # fmt: skip
        chosen = choose_steps(len(plan.bins), most, self._config.seed)
        bins = [replace(plan, bins=[plan.bins[number]]) for number in chosen]
        values = np.array([self._forward(self._loader.of(one))[0] for one in bins])
        if len(chosen) == len(plan.bins):
            return Estimate(float(values.sum()), 0.0)
        return _scaled(values[:-1], len(plan.bins) - 1, values[-1])

    def _forward(self, batches: Iterable[PackedBatch]) -> tuple[float, int]:
        """(operations of the reference's forward passes, tokens of the largest micro-batch)."""
        flops, largest = 0.0, 0
        for batch in batches:
            flops += self._reference_flops.of_batch(batch, Ask("logps"), backward=False).item()
            largest = max(largest, batch.input_ids.numel())
        return flops, largest


def _on_one_rank(plan: StepPlan) -> StepPlan:
    """The step's micro-batches without fillers, as one rank's."""
    return replace(plan, bins=[one for one in plan.bins if one.weight], dp=1)


# ---------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------


def peak_of(name: str) -> tuple[str, float]:
    """(full name, bfloat16 operations a second) of a GPU whose name ends with ``name``; ConfigError for others."""
    for full, rate in PEAKS.items():
        if f" {full}".lower().endswith(f" {name}".lower()):
            return full, rate
    raise ConfigError(f"gpu: {name} is not known; known are {', '.join(full.partition(' ')[2] for full in PEAKS)}")


def hours(flops: float, devices: int, rate: float, mfu: float) -> float:
    """Wall-clock hours of so much work on ``devices`` that each do ``mfu`` of ``rate`` operations a second."""
    return flops / (devices * rate * mfu) / 3600
