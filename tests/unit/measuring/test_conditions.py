"""Asking under conditions: levels dealt out evenly, prompts that say them, and who else measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from alignlab.config import ConditionConfig
from alignlab.data.condition import Conditioner
from alignlab.errors import ConfigError
from alignlab.measuring.conditions import levels_text, scored_by, spread, under
from alignlab.measuring.control import grid
from alignlab.measuring.verification import Answer, Prompt

LEVELS = {"steps": [1.0, 2.0, 3.0], "honesty": [1.0, 3.0]}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 12, 20])
def test_every_level_equally_often(count: int) -> None:
    """Of 3 levels, 7 answers ask for each 2 or 3 times; of 2, 3 or 4 times."""
    found = spread(LEVELS, count, seed=3)
    assert len(found) == count
    for dimension, own in LEVELS.items():
        asked = Counter(condition[dimension] for condition in found)
        assert all(count // len(own) <= asked[level] <= -(-count // len(own)) for level in own)


def test_whole_grids_first_and_every_seed_its_own() -> None:
    twice = spread(LEVELS, 12, seed=0)
    assert sorted(map(str, twice)) == sorted(map(str, grid(LEVELS) * 2))  # 12 = 2 x (3 x 2)
    assert twice == spread(LEVELS, 12, seed=0)
    assert twice != grid(LEVELS) * 2  # the order says nothing of the level
    # Three of the six cells: all three steps, the honesty beside each by chance.
    assert len({str(spread(LEVELS, 3, seed)) for seed in range(20)}) > 10


def test_a_prompt_is_asked_as_it_is_trained() -> None:
    conditioner = Conditioner(ConditionConfig(dimensions=["steps", "honesty"]), "cpo")
    plain = Prompt("a", [{"role": "system", "content": "Be."}, {"role": "user", "content": "How many?"}])
    found = under(conditioner, plain, {"honesty": 3.0, "steps": 2.0})
    assert found.messages[-1]["content"] == "<Steps: 2> <Honesty: 3> How many?"
    assert (found.id, found.requested) == ("a", {"honesty": 3.0, "steps": 2.0})
    assert plain.messages[-1]["content"] == "How many?"
    assert levels_text(LEVELS) == "steps [1, 2, 3] x honesty [1, 3] = 6 conditions"


class Length:
    """A scorer that takes no empty text, and keeps what it was asked."""

    identity, is_verifier = "length", False

    def __init__(self) -> None:
        self.asked: list[Prompt] = []

    def __call__(self, answers: Sequence[Answer]) -> list[list[float | None]]:
        self.asked += [answer.prompt for answer in answers]
        return [[float(len(text)) or None for text in answer.texts] for answer in answers]


def test_a_scorer_sees_the_prompt_without_its_condition() -> None:
    plain = [Prompt("a", "How many?"), Prompt("b", "How far?")]
    asked = [Prompt("a", "<Steps: 1> How many?"), Prompt("b", "<Steps: 1> How far?")]
    found = [Answer(asked[0], ["four"], [{"steps": 1.0}]), Answer(asked[1], [""], [{"steps": 2.0}])]
    scorer = Length()
    scored = scored_by(found, plain, {"length": scorer})
    assert scorer.asked == plain
    assert [answer.prompt for answer in scored] == asked
    assert [answer.measures for answer in scored] == [[{"steps": 1.0, "length": 4.0}], [{"steps": 2.0}]]
    with pytest.raises(ConfigError, match="'steps' is what the verifier measures already"):
        scored_by(found, plain, {"steps": scorer})
