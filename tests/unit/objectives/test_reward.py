from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from alignlab.errors import ConfigError, DataError
from alignlab.objectives.reward import Reward, RewardConfig
from alignlab.runs.job import check_flags
from alignlab.types import Unit

PAIRS = [(0, 1), (2, 1), (2, 3)]
WEIGHTS = [1.0, 2.0, 0.5]
MARGINS = [0.0, 0.7, 1.5]
FLAGS = [1.0, 0.0, 1.0]
REWARDS = [0.4, -0.3, 1.2, 0.9]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def written_out(rewards, *, margin=True, absolute=0.0, centre=0.0, pair=1.0):
    total = 0.0
    for (c, r), w, m, flag in zip(PAIRS, WEIGHTS, MARGINS, FLAGS, strict=True):
        good, bad = rewards[c], rewards[r]
        loss = -log_sigmoid(good - bad - (m if margin else 0)) * (pair if flag else 1.0)
        loss += absolute * flag * (-log_sigmoid(good) - log_sigmoid(-bad))
        total += w * (loss + centre * (good + bad) ** 2)
    return total


def batch(batch_of, pairs=PAIRS, keep=slice(None)):
    given = {"weight": WEIGHTS, "margin": MARGINS, "absolute": FLAGS}
    return batch_of([[0], [1], [2], [3]], pairs[keep], pair_values={k: v[keep] for k, v in given.items()})


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, {}),
        ({"margin": False}, {"margin": False}),
        ({"center_rewards_coefficient": 0.1}, {"centre": 0.1}),
        ({"loss_type": "eurus"}, {"absolute": 1.0}),
        ({"loss_type": "eurus", "pair_weight": 0.0}, {"absolute": 1.0, "pair": 0.0}),
        ({"loss_type": "eurus", "pair_weight": 0.25, "absolute_weight": 2.0}, {"absolute": 2.0, "pair": 0.25}),
        ({"loss_type": "eurus", "absolute_weight": 0.5, "center_rewards_coefficient": 0.2},
         {"absolute": 0.5, "centre": 0.2}),
    ],
)  # fmt: skip
def test_terms_written_out(options, terms, batch_of, table, step):
    score = table(REWARDS)
    total, output = step(Reward(RewardConfig(**options)), score, [batch(batch_of)])
    total.backward()
    assert list(output.sums) == [Unit.PAIR]
    assert total.item() == pytest.approx(written_out(REWARDS, **terms), rel=1e-13)
    h = 1e-6
    for place in range(4):
        up, down = list(REWARDS), list(REWARDS)
        up[place] += h
        down[place] -= h
        slope = (written_out(up, **terms) - written_out(down, **terms)) / (2 * h)
        assert score.values.grad[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_margins_may_be_absent(batch_of, table, step):
    total, _ = step(Reward(), table(REWARDS), [batch_of([[0], [1]], [(0, 1)])])
    assert total.item() == pytest.approx(-log_sigmoid(0.7))


@pytest.mark.parametrize(("loss_type", "absolute", "refused"), [
    ("eurus", [0.0, 0.0], True), ("eurus", [0.0, 1.0], False), ("bradley_terry", [0.0, 0.0], False),
])  # fmt: skip
def test_eurus_on_rows_without_a_flag_is_refused(loss_type, absolute, refused):
    rows = SimpleNamespace(index=SimpleNamespace(pair_values={"absolute": np.array(absolute)}))
    data = SimpleNamespace(objective=Reward(RewardConfig(loss_type=loss_type)), train=rows)
    words = r"none of the 2 training pairs is; set data\.absolute=true"
    with pytest.raises(DataError, match=words) if refused else nullcontext():
        check_flags(data)


def test_micro_batches_add_up_and_statistics(batch_of, table, step):
    objective = Reward(RewardConfig(loss_type="eurus"))
    whole, output = step(objective, table(REWARDS), [batch(batch_of)])
    parts, _ = step(objective, table(REWARDS), [batch(batch_of, keep=slice(0, 1)), batch(batch_of, keep=slice(1, 3))])
    assert parts.item() == pytest.approx(whole.item(), rel=1e-14)
    found = {name: (s.total / s.weight).item() for name, s in output.stats.items()}
    assert found["accuracy"] == 1.0
    assert found["rewards/chosen_positive"] == 1.0
    assert found["rewards/rejected_negative"] == pytest.approx(3.0 / 3.5)
    assert found["absolute_share"] == pytest.approx(1.5 / 3.5)
    assert output.stats["loss/absolute"].weight.item() == 1.5


def test_options():
    with pytest.raises(ConfigError, match="'bt' is none of bradley_terry, eurus"):
        RewardConfig(loss_type="bt")
