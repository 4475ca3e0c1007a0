"""Log-probabilities are computed once for all shadow objectives of a probe set, and only where they are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.data.index import Index
from alignlab.data.loader import Loader
from alignlab.data.random_trees import random_sample, write_index
from alignlab.objectives.dpo import DPO, DPOConfig
from alignlab.objectives.ift import IFT
from alignlab.train.shadow import Remembered, Shadow, evaluate_shadows
from alignlab.train.single import ScoreEngine, plans_of
from alignlab.types import Ask, Mix, PackedBatch, Scores, StepContext

CONTEXT = StepContext(3, 10, 1, 0, {}, state={"bco_mean": 5.0, "bco_count": 7.0})


class Counting:
    """A score that counts its questions: log-probabilities follow from the target tokens alone."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, batch: PackedBatch, ask: Ask) -> Scores:
        self.asked.append(ask.want if ask.mix is None else "mixed")
        if ask.want == "greedy":
            return Scores(tokens=batch.targets)
        return Scores(logps=-0.1 - (batch.targets % 7).double() / 7)


class Engine(ScoreEngine):
    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture
def index(tmp_path: Path) -> Index:
    rng = np.random.default_rng(0)
    made = write_index(tmp_path / "index", [random_sample(rng, number) for number in range(6)])
    made.attach("reference", np.full(made.num_sequences, -4.0))
    return made


def shadow(index: Index, objectives: dict[str, Any]) -> Shadow:
    one = next(iter(objectives.values()))
    loader = Loader(index, "rows", torch.device("cpu"), torch.float64, 0, mixes_inputs=one.mixes_inputs)
    return Shadow(objectives, plans_of(index, one, token_budget=60), loader)


def test_losses_on_the_same_rows_share_one_pass(index: Index) -> None:
    score = Counting()
    kinds = {"dpo": "sigmoid", "ipo": "ipo", "simpo": "simpo"}
    pairs = {name: DPO(DPOConfig(loss_type=kind)) for name, kind in kinds.items()}
    whole = shadow(index, pairs)
    batches = len(whole.plans.at(0).bins)
    assert batches > 1
    together = evaluate_shadows(Engine(score), [whole], CONTEXT)
    assert score.asked == ["logps"] * batches
    alone: dict[str, float] = {}
    for name, objective in pairs.items():
        alone |= evaluate_shadows(Engine(Counting()), [shadow(index, {name: objective})], CONTEXT)
    assert together == alone
    ends = ("", "_margin", "_accuracy", "_chosen", "_rejected")
    assert sorted(together) == sorted(f"shadow/{name}{end}" for name in kinds for end in ends)
    assert len(set(together.values())) > 5


def test_the_running_objective_lends_its_memory_to_none(index: Index) -> None:
    """bco_pair compares with the mean reward of the run it trains: a shadow of another run has none."""
    running = {"bco": DPO(DPOConfig(loss_type="bco_pair", bco_running_mean=True))}
    fixed = {"bco": DPO(DPOConfig(loss_type="bco_pair"))}
    found = [evaluate_shadows(Engine(Counting()), [shadow(index, one)], CONTEXT) for one in (running, fixed)]
    assert found[0]["shadow/bco"] == pytest.approx(found[1]["shadow/bco"])


def test_mixed_inputs_are_never_taken_from_memory(index: Index) -> None:
    score = Counting()
    evaluate_shadows(Engine(score), [shadow(index, {"ift": IFT()})], CONTEXT)
    assert set(score.asked) == {"greedy", "mixed"}


def test_only_the_same_question_about_the_same_micro_batch_is_remembered(index: Index) -> None:
    counting = Counting()
    remembered = Remembered(counting)
    whole = shadow(index, {"dpo": DPO()})
    first, second = list(whole.loader.of(whole.plans.at(0)))[:2]
    plain, mixed = Ask("logps"), Ask("logps", mix=Mix(first.targets, 0.5))
    for batch, ask in ((first, plain), (first, plain), (second, plain), (first, mixed), (first, mixed)):
        assert torch.equal(remembered(batch, ask).logps, Counting()(batch, ask).logps)  # type: ignore[arg-type]
    assert counting.asked == ["logps", "logps", "logps", "mixed", "mixed"]  # within a pass nothing comes from memory
    remembered.end_of_pass()
    counting.asked.clear()
    for batch, ask in ((first, plain), (second, plain), (first, mixed)):
        assert torch.equal(remembered(batch, ask).logps, Counting()(batch, ask).logps)  # type: ignore[arg-type]
    remembered(first._replace(weight=0.0), plain)  # a filler may hold other rows under the same numbers
    with_partner = first._replace(sequence_values={**first.sequence_values, "partner": first.last.double()})
    remembered(with_partner, plain)
    assert counting.asked == ["mixed", "logps", "logps"]
