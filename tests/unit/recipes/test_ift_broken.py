"""The wrong objectives of recipes/ift do what they say: one place early, and sides swapped in training alone."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from alignlab.data.loader import Loader
from alignlab.data.random_trees import random_sample, write_index
from alignlab.objectives.dpo import DPO
from alignlab.train.single import plans_of
from alignlab.types import Ask, PackedBatch, Scores, StepContext, Unit

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def loaded(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"wrong_{Path(file).stem}", RECIPES / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    """Two random prompt trees, whose sequences share scored prefixes."""
    rng = np.random.default_rng(0)
    index = write_index(tmp_path_factory.mktemp("index"), [random_sample(rng, number) for number in range(2)])
    index.attach("reference", np.full(index.num_sequences, -4.0))
    loader = Loader(index, "tree", torch.device("cpu"), torch.float64, 0)
    return next(iter(loader.of(plans_of(index, DPO(), layout="tree").at(0))))


def test_every_residual_token_is_that_of_the_next_place(batch: PackedBatch) -> None:
    tokens = torch.arange(len(batch.scored)) + 100
    shifted = loaded("ift/broken.py").one_place_early(tokens, batch)
    followers: dict[int, set[int]] = {}
    for start, end in zip(batch.seq_ptr[:-1].tolist(), batch.seq_ptr[1:].tolist(), strict=True):
        places = batch.seq_idx[start:end].tolist()
        for here, behind in zip(places, [*places[1:], places[-1]], strict=True):
            followers.setdefault(here, set()).add(behind)
    assert len(followers) == len(tokens)
    # Where sequences part, a shared place has the follower of one of them.
    assert all(int(shifted[here]) - 100 in behind for here, behind in followers.items())
    assert (shifted != tokens).sum() > len(tokens) / 2


def test_sides_change_places_in_training_and_not_in_evaluation(batch: PackedBatch) -> None:
    def score(batch: PackedBatch, ask: Ask) -> Scores:
        return Scores(logps=-0.1 - (batch.targets % 7).double() / 7)

    swapped = loaded("common/swapped.py").SwappedDPO()
    context = StepContext(0, 1, 0, 0, {})
    flipped = batch._replace(pairs=batch.pairs.flip(1))
    for now, same_as in ((context, flipped), (replace(context, training=False), batch)):
        found = swapped(score, batch, now).sums[Unit.PAIR]
        assert torch.equal(found, DPO()(score, same_as, now).sums[Unit.PAIR])
    assert not torch.equal(swapped(score, batch, context).sums[Unit.PAIR], DPO()(score, batch, context).sums[Unit.PAIR])
