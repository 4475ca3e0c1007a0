from __future__ import annotations

import pytest
import torch

from alignlab.errors import ConfigError
from alignlab.objectives.cpo import CPSFT
from alignlab.objectives.sft import SFT, SFTConfig
from alignlab.types import Unit

CELLS = [[0, 1, 2], [0, 3], [4]]
WEIGHTS = [1.0, 2.0, 0.5]


@pytest.mark.parametrize("objective", [SFT, CPSFT])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_sums_written_out(unit, objective, batch_of, table, step):
    score = table([-1.0, -2.0, -3.0, -4.0, -5.0])
    batch = batch_of(CELLS, sequence_values={"weight": WEIGHTS})
    total, output = step(objective(objective.Config(unit=unit)), score, [batch])
    by_sequence = [6.0, 5.0, 5.0]
    expected = sum(
        w * s / (len(c) if unit == "sequence" else 1) for w, s, c in zip(WEIGHTS, by_sequence, CELLS, strict=True)
    )
    assert list(output.sums) == [Unit(unit)]
    assert total.item() == pytest.approx(expected, rel=1e-14)
    token, sequence = output.stats["loss/token"], output.stats["loss/sequence"]
    assert (token.total / token.weight).item() == pytest.approx((6 + 10 + 2.5) / (3 + 4 + 0.5))
    assert (sequence.total / sequence.weight).item() == pytest.approx((2 + 5 + 2.5) / 3.5)


def test_a_shared_token_gets_the_gradient_of_all_its_sequences(batch_of, table, step):
    score = table([-1.0, -2.0, -3.0, -4.0, -5.0])
    total, _ = step(SFT(), score, [batch_of(CELLS)])
    total.backward()
    assert score.values.grad.tolist() == [-2.0, -1.0, -1.0, -1.0, -1.0]


def test_unknown_unit_is_refused():
    with pytest.raises(ConfigError, match=r"objective.unit: 'pair' is none of token, sequence"):
        SFTConfig(unit="pair")


def test_micro_batches_add_up(batch_of, table, step):
    values = -torch.rand(5, generator=torch.Generator().manual_seed(1))
    whole, _ = step(SFT(), table(values), [batch_of(CELLS)])
    parts, _ = step(SFT(), table(values), [batch_of(CELLS[:1]), batch_of(CELLS[1:])])
    assert parts.item() == pytest.approx(whole.item(), rel=1e-14)
