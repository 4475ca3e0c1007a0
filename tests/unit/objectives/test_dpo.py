from __future__ import annotations

import math

import pytest
import torch

from alignlab.errors import ConfigError
from alignlab.objectives.cpo import CPO
from alignlab.objectives.dpo import DPO, DPOConfig
from alignlab.objectives.pair_losses import LOSS_TYPES
from alignlab.types import Unit

CELLS = [[0, 1, 2], [0, 3], [4, 5], [6, 7, 8, 9], [10], [11, 12]]
PAIRS = [(0, 1), (2, 3), (4, 5), (5, 3)]
WEIGHTS = [1.0, 0.5, 2.0, 1.5]
REFERENCE = [-5.0, -2.5, -4.0, -9.0, -1.0, -3.0]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def log_odds(mean):
    return mean - math.log(1 - math.exp(mean))


# Every loss written out for one pair: w, lo are log-ratios, pw, pl policy log-probabilities, nw, nl numbers of targets.
FORMULAS = {
    "sigmoid": lambda w, lo, pw, pl, nw, nl, b, e: -log_sigmoid(b * (w - lo)) * (1 - e) - e * log_sigmoid(b * (lo - w)),
    "ipo": lambda w, lo, pw, pl, nw, nl, b, e: (w / nw - lo / nl - 1 / (2 * b)) ** 2,
    "hinge": lambda w, lo, pw, pl, nw, nl, b, e: max(0.0, 1 - b * (w - lo)),
    "robust": lambda w, lo, pw, pl, nw, nl, b, e: (
        (-(1 - e) * log_sigmoid(b * (w - lo)) + e * log_sigmoid(-b * (w - lo))) / (1 - 2 * e)
    ),
    "nca_pair": lambda w, lo, pw, pl, nw, nl, b, e: (
        -log_sigmoid(b * w) - 0.5 * log_sigmoid(-b * w) - 0.5 * log_sigmoid(-b * lo)
    ),
    "bco_pair": lambda w, lo, pw, pl, nw, nl, b, e: -log_sigmoid(b * w) - log_sigmoid(-b * lo),
    "exo_pair": lambda w, lo, pw, pl, nw, nl, b, e: (
        logistic(b * (w - lo)) * (log_sigmoid(b * (w - lo)) - math.log(1 - e))
        + logistic(b * (lo - w)) * (log_sigmoid(b * (lo - w)) - math.log(e))
    ),
    "apo_zero": lambda w, lo, pw, pl, nw, nl, b, e: 1 - logistic(b * w) + logistic(b * lo),
    "apo_down": lambda w, lo, pw, pl, nw, nl, b, e: logistic(b * w) + 1 - logistic(b * (w - lo)),
    "simpo": lambda w, lo, pw, pl, nw, nl, b, e: (
        -(1 - e) * log_sigmoid(b * (pw / nw - pl / nl) - 0.5) - e * log_sigmoid(0.5 - b * (pw / nw - pl / nl))
    ),
    "orpo": lambda w, lo, pw, pl, nw, nl, b, e: -b * log_sigmoid(log_odds(pw / nw) - log_odds(pl / nl)),
    "sppo_hard": lambda w, lo, pw, pl, nw, nl, b, e: (w - 0.5 / b) ** 2 + (lo + 0.5 / b) ** 2,
}


def values(seed=0):
    return -0.05 - 2 * torch.rand(13, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(name, logps, beta, epsilon):
    sums = [sum(logps[c] for c in row) for row in CELLS]
    total = 0.0
    for (w, lo), weight in zip(PAIRS, WEIGHTS, strict=True):
        ratios = sums[w] - REFERENCE[w], sums[lo] - REFERENCE[lo]
        total += weight * FORMULAS[name](*ratios, sums[w], sums[lo], len(CELLS[w]), len(CELLS[lo]), beta, epsilon)
    return total


def whole(batch_of, cells=CELLS, pairs=PAIRS, weights=WEIGHTS, reference=REFERENCE):
    return batch_of(cells, pairs, sequence_values={"reference": reference}, pair_values={"weight": weights})


def cut(batch_of):
    """The same four pairs in three micro-batches."""
    groups = [[0], [1, 3], [2]]
    batches = []
    for group in groups:
        sequences = sorted({s for p in group for s in PAIRS[p]})
        batches.append(
            whole(
                batch_of,
                [CELLS[s] for s in sequences],
                [tuple(sequences.index(s) for s in PAIRS[p]) for p in group],
                [WEIGHTS[p] for p in group],
                [REFERENCE[s] for s in sequences],
            )
        )
    return batches


SMOOTHED = ("sigmoid", "robust", "exo_pair", "simpo")
CASES = [(n, 0.0) for n in sorted(FORMULAS) if n != "exo_pair"] + [(n, 0.1) for n in SMOOTHED]


@pytest.mark.parametrize(("name", "epsilon"), CASES)
def test_every_loss_against_its_formula(name, epsilon, batch_of, table, step):
    score = table(values())
    _total, output = step(DPO(DPOConfig(loss_type=name, beta=0.3, label_smoothing=epsilon)), score, [whole(batch_of)])
    expected = written_out(name, score.values.tolist(), 0.3, epsilon)
    assert output.sums[Unit.PAIR].item() == pytest.approx(expected, rel=1e-12)
    output.sums[Unit.PAIR].backward()
    at, h = score.values.tolist(), 1e-6
    for cell in range(len(at)):
        up, down = list(at), list(at)
        up[cell] += h
        down[cell] -= h
        slope = (written_out(name, up, 0.3, epsilon) - written_out(name, down, 0.3, epsilon)) / (2 * h)
        assert score.values.grad[cell].item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_all_loss_types_are_covered():
    assert {*FORMULAS, "kto_pair", "sft"} == set(LOSS_TYPES)


@pytest.mark.parametrize("objective", [DPO, CPO])
def test_first_loss_is_ln_2(objective, batch_of, table, step):
    score = table(values())
    sums = [sum(score.values[c].item() for c in row) for row in CELLS]
    total, output = step(objective(), score, [whole(batch_of, reference=sums)])
    assert total.item() / sum(WEIGHTS) == pytest.approx(math.log(2), rel=1e-15)
    assert output.stats["rewards/accuracies"].total.item() == 0


def kto_pair_of_the_step(logps, beta):
    """The step's mean loss in one graph, K not detached."""
    sums = torch.stack([logps[row].sum() for row in CELLS]) - torch.tensor(REFERENCE, dtype=torch.float64)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    w = torch.stack([sums[p[0]] for p in PAIRS])
    lo = torch.stack([sums[p[1]] for p in PAIRS])
    kl_w = ((weights * w).sum() / weights.sum()).clamp(min=0)
    kl_l = ((weights * lo).sum() / weights.sum()).clamp(min=0)
    losses = torch.cat((1 - torch.sigmoid(beta * (w - kl_l)), 1 - torch.sigmoid(beta * (kl_w - lo))))
    return (torch.cat((weights, weights)) * losses).sum() / (2 * weights.sum())


def mean_ratios(logps):
    """(chosen, rejected): the two means that kto_pair clamps at 0."""
    ratios = [logps[row].sum().item() - r for row, r in zip(CELLS, REFERENCE, strict=True)]
    return [
        sum(w * ratios[pair[side]] for pair, w in zip(PAIRS, WEIGHTS, strict=True)) / sum(WEIGHTS) for side in (0, 1)
    ]


KL_CASES = {"both": (0.9, 0.9), "none": (-0.9, -0.9), "chosen": (0.8, -0.7), "rejected": (-0.7, 0.8)}
"""Which of the two means are above 0, and how far to move them there."""


def lifted(above):
    """Log-probabilities whose two mean log-ratios are the case's; cells 1 and 4 are in chosen answers only, 3 and 6
    in rejected ones only."""
    logps = values(3).requires_grad_()
    for side, (cells, wanted) in enumerate(zip(((1, 4), (3, 6)), KL_CASES[above], strict=True)):
        weight = sum(
            w * sum(cell in CELLS[pair[side]] for cell in cells) for pair, w in zip(PAIRS, WEIGHTS, strict=True)
        ) / sum(WEIGHTS)
        with torch.no_grad():
            logps[list(cells)] += (wanted - mean_ratios(logps)[side]) / weight
    assert mean_ratios(logps) == pytest.approx(KL_CASES[above])
    return logps.detach()


@pytest.mark.parametrize("above", KL_CASES)
@pytest.mark.parametrize("split", ["one", "several"])
def test_kto_pair_has_the_exact_gradient_of_the_step(split, above, batch_of, table, step):
    logps = lifted(above)
    score = table(logps)
    batches = [whole(batch_of)] if split == "one" else cut(batch_of)
    total, _ = step(DPO(DPOConfig(loss_type="kto_pair", beta=0.4)), score, batches)
    (total / sum(WEIGHTS)).backward()
    leaf = logps.clone().requires_grad_()
    expected = kto_pair_of_the_step(leaf, 0.4)
    expected.backward()
    assert total.item() / sum(WEIGHTS) == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(score.values.grad, leaf.grad, rtol=1e-12, atol=1e-14)


def test_kto_pair_starts_the_same_whatever_the_rounding(batch_of, table, step):
    """At the first step policy and reference agree up to rounding; its sign must not decide the gradient."""
    gradients = []
    for noise in (-1e-7, 1e-7):
        score = table(values(3))
        sums = [sum(score.values[c].item() for c in row) - noise for row in CELLS]
        total, _ = step(DPO(DPOConfig(loss_type="kto_pair", beta=0.4)), score, [whole(batch_of, reference=sums)])
        total.backward()
        gradients.append(score.values.grad)
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_bco_running_mean_over_two_steps(batch_of, table, step, at):
    objective = DPO(DPOConfig(loss_type="bco_pair", beta=0.3, bco_running_mean=True))
    seen, state = [], {}
    for number in range(2):
        score = table(values(number))
        sums = [sum(score.values[c].item() for c in row) - r for row, r in zip(CELLS, REFERENCE, strict=True)]
        for p, weight in zip(PAIRS, WEIGHTS, strict=True):
            seen += [(0.3 * sums[p[0]], weight), (0.3 * sums[p[1]], weight)]
        shift = sum(r * w for r, w in seen) / sum(w for _, w in seen)
        expected = sum(
            weight * (-log_sigmoid(0.3 * sums[p[0]] - shift) - log_sigmoid(shift - 0.3 * sums[p[1]]))
            for p, weight in zip(PAIRS, WEIGHTS, strict=True)
        )
        total, _ = step(objective, score, cut(batch_of), state=state)
        assert total.item() == pytest.approx(expected, rel=1e-12)
        with torch.no_grad():
            parts = [objective.step_statistics(score, b, at(state=state)) for b in cut(batch_of)]
        statistics = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        state = objective.end_of_step(at(state=state, statistics=statistics))
        assert state["bco_mean"] == pytest.approx(shift, rel=1e-12)
    held_out, _ = step(objective, score, cut(batch_of), state=state, training=False)
    assert held_out.item() == pytest.approx(expected, rel=1e-12)


def test_sums_of_losses_mix_units(batch_of, table, step):
    score = table(values())
    config = DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.3)
    objective = DPO(config)
    _, output = step(objective, score, [whole(batch_of)])
    chosen = sum(w * -sum(score.values[c].item() for c in CELLS[p[0]]) for p, w in zip(PAIRS, WEIGHTS, strict=True))
    assert objective.units == (Unit.PAIR, Unit.TOKEN)
    assert output.sums[Unit.TOKEN].item() == pytest.approx(0.2 * chosen, rel=1e-12)
    assert output.sums[Unit.PAIR].item() == pytest.approx(
        written_out("sigmoid", score.values.tolist(), 0.3, 0.0), rel=1e-12
    )
    orpo = step(DPO(DPOConfig(loss_type="orpo")), score, [whole(batch_of)])[1]
    assert orpo.sums[Unit.TOKEN].item() == pytest.approx(chosen, rel=1e-12)


@pytest.mark.parametrize("name", [n for n in LOSS_TYPES if n != "sft"])
def test_micro_batches_add_up(name, batch_of, table, step):
    config = DPOConfig(loss_type=name, label_smoothing=0.1 if name == "exo_pair" else 0.0)
    score = table(values(5))
    total, _ = step(DPO(config), score, [whole(batch_of)])
    parts, _ = step(DPO(config), score, cut(batch_of))
    assert parts.item() == pytest.approx(total.item(), rel=1e-12)


def test_statistics(batch_of, table, step):
    score = table(values())
    _, output = step(DPO(DPOConfig(beta=0.3)), score, [whole(batch_of)])
    sums = [sum(score.values[c].item() for c in row) for row in CELLS]
    margins = [0.3 * (sums[w] - REFERENCE[w] - sums[lo] + REFERENCE[lo]) for w, lo in PAIRS]
    found = {name: (s.total / s.weight).item() for name, s in output.stats.items()}
    assert found["rewards/margins"] == pytest.approx(
        sum(m * w for m, w in zip(margins, WEIGHTS, strict=True)) / sum(WEIGHTS)
    )
    assert found["rewards/accuracies"] == pytest.approx(
        sum((m > 0) * w for m, w in zip(margins, WEIGHTS, strict=True)) / sum(WEIGHTS)
    )
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    assert not any(s.total.requires_grad for s in output.stats.values())


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_reference_need_none(name, batch_of, table, step):
    objective = DPO(DPOConfig(loss_type=name))
    assert not objective.needs_reference
    step(objective, table(values()), [batch_of(CELLS, PAIRS)])
    assert not DPO(DPOConfig(reference_free=True)).needs_reference
    assert DPO(DPOConfig(loss_type=["simpo", "ipo"])).needs_reference


def test_a_certain_answer_keeps_orpo_finite(batch_of, table, step):
    score = table([0.0] * 13)
    total, _ = step(DPO(DPOConfig(loss_type="orpo")), score, [batch_of(CELLS, PAIRS)])
    total.backward()
    assert total.isfinite()
    assert score.values.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "exo_pair"}, "exo_pair needs it above 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "robust needs it below 0.5"),
        ({"loss_type": "sft"}, "use objective=sft"),
        ({"loss_type": "dpo"}, "'dpo' is none of sigmoid"),
        ({"loss_type": []}, "at least one loss"),
        ({"loss_type": ["ipo", "ipo"]}, "each once"),
        ({"loss_weights": [1.0, 2.0]}, "2 weights for 1 loss types"),
        ({"beta": 0.0}, "beta: 0.0 must be above 0"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        DPOConfig(**options)
    assert "\n" not in str(error.value)


def test_contrastive_cpo_is_hinted():
    assert "not contrastive" in CPO.hints["cpo_alpha"]
