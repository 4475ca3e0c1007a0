from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from alignlab.errors import ConfigError, DataError
from alignlab.objectives.kto import KTO, KTOConfig

CELLS = [[0, 1, 2], [3, 4], [5, 6], [7]]
LABELS = [1.0, 0.0, 1.0, 0.0]
WEIGHTS = [1.0, 2.0, 0.5, 1.0]
REFERENCE = [-2.5, -1.5, -3.0, -0.5]
KL = torch.tensor([1.0, -0.2, 0.7], dtype=torch.float64)
KL_WEIGHTS = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
STATISTICS = {"kl": KL, "weight": KL_WEIGHTS}


def values():
    return -2 * torch.rand(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def make(batch_of, chosen):
    given = {"label": LABELS, "weight": WEIGHTS, "reference": REFERENCE}
    return batch_of([CELLS[s] for s in chosen], sequence_values={k: [v[s] for s in chosen] for k, v in given.items()})


def written_out(logps, z, beta, desirable, undesirable):
    total = 0.0
    for cells, label, weight, reference in zip(CELLS, LABELS, WEIGHTS, REFERENCE, strict=True):
        ratio = sum(logps[c] for c in cells) - reference
        if label:
            total += weight * desirable * (1 - 1 / (1 + math.exp(-beta * (ratio - z))))
        else:
            total += weight * undesirable * (1 - 1 / (1 + math.exp(-beta * (z - ratio))))
    return total


@pytest.mark.parametrize("sign", [1, -1])
def test_loss_and_gradient_written_out(sign, batch_of, table, at):
    objective = KTO(KTOConfig(beta=0.4, desirable_weight=1.33, undesirable_weight=0.7))
    z = max(0.0, sign * (1.0 - 0.2 + 2.1) / 5)
    score = table(values())
    output = objective(score, make(batch_of, range(4)), at(statistics={"kl": sign * KL, "weight": KL_WEIGHTS}))
    total = sum(output.sums.values())
    total.backward()
    assert total.item() == pytest.approx(written_out(score.values.tolist(), z, 0.4, 1.33, 0.7), rel=1e-12)
    at_values, h = score.values.tolist(), 1e-6
    for cell in range(len(at_values)):
        up, down = list(at_values), list(at_values)
        up[cell] += h
        down[cell] -= h
        slope = (written_out(up, z, 0.4, 1.33, 0.7) - written_out(down, z, 0.4, 1.33, 0.7)) / (2 * h)
        assert score.values.grad[cell].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert output.stats["kl"].total.item() == pytest.approx(z)
    assert output.stats["rewards/chosen"].weight.item() == 1.5
    assert output.stats["rewards/rejected"].weight.item() == 3.0


def test_step_statistics_are_the_mismatched_rows(batch_of, table, at):
    score = table(values())
    found = KTO().step_statistics(score, make(batch_of, [1, 2]), at())
    sums = [score.values[[3, 4]].sum().item() + 1.5, score.values[[5, 6]].sum().item() + 3.0]
    assert found["kl"].tolist() == pytest.approx(sums)
    assert found["weight"].tolist() == [2.0, 0.5]


def test_micro_batches_add_up(batch_of, table, at):
    score = table(values())
    given = at(statistics=STATISTICS)
    whole = sum(KTO()(score, make(batch_of, range(4)), given).sums.values())
    parts = sum(sum(KTO()(score, make(batch_of, part), given).sums.values()) for part in ([2], [0, 3], [1]))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-14)


def test_rows_without_labels_are_refused(batch_of, table, at):
    batch = make(batch_of, range(4))
    batch = batch._replace(sequence_values={k: v for k, v in batch.sequence_values.items() if k != "label"})
    with pytest.raises(DataError, match="label"):
        KTO()(table(values()), batch, at(statistics=STATISTICS))


def test_options():
    with pytest.raises(ConfigError, match="beta"):
        KTOConfig(beta=-1.0)
    assert replace(KTOConfig(), desirable_weight=0.0).desirable_weight == 0
