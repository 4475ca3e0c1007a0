from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignlab.errors import ConfigError
from alignlab.objectives.ift import IFT, IFTConfig, propagated, propagation_weights
from alignlab.objectives.sft import SFT, SFTConfig

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden"
CELLS = [[0, 1, 2, 3, 4], [5, 6], [7], [8, 9, 10, 11, 12, 13]]
DEPTH = [[3, 4, 5, 6, 7], [2, 3], [9], [4, 5, 9, 10, 11, 20]]
"""The last sequence has two turns of context inside it: positions on the path jump."""


def values(seed=0):
    return -3 * torch.rand(14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_weights(losses, depth, config):
    """One sequence, by loops, with Python numbers kept in the graph."""
    n = len(losses)
    items = {"loss": [x / n for x in losses], "logps": list(losses), "mask": [torch.ones(()).double()] * n}
    items = items[config.propagation_type]
    g = config.gamma
    if config.propagation == "linear":
        sums = [sum(g ** (depth[t] - depth[m]) for m in range(t + 1)) for t in range(n)]
        return torch.tensor(sums, dtype=torch.float64)
    if config.propagation_side == "left":
        s = torch.stack([sum(g ** (depth[j] - depth[t]) * items[j] for j in range(t, n)) for t in range(n)])
        raw = {
            "L1": lambda: s,
            "L2": lambda: s**2,
            "softmax": lambda: torch.softmax(s, 0),
            "log": lambda: (s + 1).log(),
        }
    else:
        s = torch.stack([sum(g ** (depth[t] - depth[j]) * items[j] for j in range(t + 1)) for t in range(n)])
        s = s + s.min()
        raw = {
            "L1": lambda: 1 / s,
            "L2": lambda: 1 / s**2,
            "softmax": lambda: torch.softmax(1 / s, 0),
            "log": lambda: 1 / (s + 1).log(),
        }
    weights = raw[config.propagation_norm]()
    return weights * n / weights.sum()


def in_float32(case):
    """The golden loss of a ``mask`` case, its weights by the recurrence y = 1 + gamma y in single precision."""
    total = 0.0
    for logps, mask in zip(case["logps"], case["mask"], strict=True):
        targets = [x for x, m in zip(logps, mask, strict=True) if m]
        sums = [torch.ones(())]
        for _ in targets[1:]:
            sums.append(1 + case["gamma"] * sums[-1])
        weights = torch.stack(sums[::-1])
        weights = weights * (len(targets) / weights.sum())
        total += -sum(x * w for x, w in zip(targets, weights.tolist(), strict=True)) / len(targets)
    return total / len(case["logps"])


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="shared/golden is not beside this checkout")
def test_golden_weights(batch_of, table, step):
    cases = json.loads((GOLDEN / "ift_weights.json").read_text())
    for case in cases:
        names = ("gamma", "propagation_type", "propagation_norm", "propagation_side")
        config = IFTConfig(max_lambda=0.0, **{name: case[name] for name in names})
        mask = torch.tensor(case["mask"]).bool()
        width = mask.shape[1]
        cells = [[r * width + c for c in row.nonzero().flatten().tolist()] for r, row in enumerate(mask)]
        batch = batch_of(cells, depth=[[c % width for c in row] for row in cells])
        score = table([x for row in case["logps"] for x in row])
        total, _ = step(IFT(config), score, [batch])
        loss = total / len(cells)
        loss.backward()
        # The released code keeps the mask, hence the counts summed for propagation_type=mask, in float32.
        single = case["propagation_type"] == "mask"
        tolerance = 2e-7 if single else 1e-9
        if single:
            assert in_float32(case) == pytest.approx(case["loss"], rel=1e-14)
        assert loss.item() == pytest.approx(case["loss"], rel=tolerance)
        expected = torch.tensor(case["grad_logps"], dtype=torch.float64).flatten()
        torch.testing.assert_close(score.values.grad, expected, rtol=tolerance, atol=1e-15)
        if case["gamma"]:
            weights = propagation_weights(-score.values[batch.scored][batch.seq_idx], batch, config)
            wanted = torch.tensor(case["weight"], dtype=torch.float64).flatten()[[c for row in cells for c in row]]
            torch.testing.assert_close(weights.detach(), wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize("gamma", [0.6, 1.0])
@pytest.mark.parametrize("norm", ["L1", "L2", "softmax", "log"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["loss", "logps", "mask"])
def test_weights_and_gradients_against_loops(kind, side, norm, gamma, batch_of):
    config = IFTConfig(gamma=gamma, propagation_type=kind, propagation_side=side, propagation_norm=norm)
    batch = batch_of(CELLS, depth=DEPTH)
    losses = (-values()).requires_grad_()
    found = propagated(losses[batch.scored][batch.seq_idx], batch, config)
    expected = torch.stack(
        [
            (losses[row] * naive_weights(list(losses[row]), depth, config)).mean()
            for row, depth in zip(CELLS, DEPTH, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    ours = torch.autograd.grad((found * scale).sum(), losses, retain_graph=True)[0]
    theirs = torch.autograd.grad((expected * scale).sum(), losses)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.6, 1.0])
def test_linear_form_is_equation_21(gamma, batch_of):
    config = IFTConfig(propagation="linear", gamma=gamma)
    losses = -values()[:5]
    batch = batch_of([[0, 1, 2, 3, 4]])
    places = range(5)
    double_sum = sum(gamma ** (i - n) * losses[i] for n in places for i in range(n, 5)) / 5
    closed = sum(losses[t] * ((1 - gamma ** (t + 1)) / (1 - gamma) if gamma < 1 else t + 1) for t in places) / 5
    found = propagated(losses[batch.seq_idx], batch, config)
    assert found.item() == pytest.approx(double_sum.item(), rel=1e-12)
    assert found.item() == pytest.approx(closed.item(), rel=1e-12)
    gaps = batch_of(CELLS, depth=DEPTH)
    found = propagation_weights(-values()[gaps.seq_idx], gaps, config)
    expected = torch.cat([naive_weights([0.0] * len(d), d, config) for d in DEPTH])
    torch.testing.assert_close(found, expected.double(), rtol=1e-12, atol=0)


def test_detached_weights_and_no_propagation(batch_of):
    batch = batch_of(CELLS, depth=DEPTH)
    losses = (-values()).requires_grad_()
    config = IFTConfig(detach_weights=True)
    found = propagated(losses[batch.seq_idx], batch, config)
    weights = propagation_weights(losses[batch.seq_idx], batch, config)
    assert not weights.requires_grad
    torch.testing.assert_close(found, propagated(losses[batch.seq_idx], batch, IFTConfig()))
    grad = torch.autograd.grad(found.sum(), losses)[0]
    counts = torch.tensor([5.0] * 5 + [2.0] * 2 + [1.0] + [6.0] * 6, dtype=torch.float64)
    torch.testing.assert_close(grad, weights / counts)
    plain = propagated(losses[batch.seq_idx], batch, IFTConfig(propagation="none"))
    torch.testing.assert_close(plain, torch.stack([losses[row].mean() for row in CELLS]))


def test_without_residual_and_decay_it_is_sequence_sft_exactly(batch_of, table, step):
    batch = batch_of(CELLS, depth=DEPTH, sequence_values={"weight": [1.0, 0.5, 2.0, 1.0]})
    ift, sft = table(values()), table(values())
    total, output = step(IFT(IFTConfig(max_lambda=0.0, gamma=0.0)), ift, [batch])
    expected, reference = step(SFT(SFTConfig(unit="sequence")), sft, [batch])
    total.backward()
    expected.backward()
    assert total.item() == expected.item()
    assert torch.equal(ift.values.grad, sft.values.grad)
    assert list(output.sums) == list(reference.sums)
    assert [ask.want for ask in ift.asked] == ["logps"]
    assert ift.asked[0].mix is None


def test_negative_share_equals_the_closed_form(batch_of, table, step):
    """Section 1.1 of the analysis: an easy stretch after a hard one is told to become less easy."""
    config = IFTConfig(max_lambda=0.0)
    losses = torch.cat((torch.full((100,), 2.0), torch.full((100,), 0.3))).double()
    batch = batch_of([list(range(200))])
    _, output = step(IFT(config), table(-losses), [batch])
    gamma, places = config.gamma, torch.arange(200)
    future = torch.stack([(gamma ** (places[k:] - k) * losses[k:]).sum() for k in places.tolist()])
    past = torch.stack([(gamma ** (k - places[: k + 1]) * losses[: k + 1]).sum() for k in places.tolist()])
    loss = (losses * future).sum() / future.sum()
    coefficient = (future + past - loss * (1 - gamma ** (places + 1)) / (1 - gamma)) / future.sum()
    share = output.stats["negative_share"]
    assert (coefficient < 0).sum() > 50
    assert share.total.item() == (coefficient < 0).sum().item()
    assert share.weight.item() == 200
    _, detached = step(IFT(replace(config, detach_weights=True)), table(-losses), [batch])
    assert detached.stats["negative_share"].total.item() == 0


def test_two_passes_and_their_mix(batch_of, table, step):
    batch = batch_of(CELLS, depth=DEPTH)
    score = table(values())
    step(IFT(), score, [batch])
    first, second = score.asked
    assert (first.want, first.mix, second.want) == ("greedy", None, "logps")
    assert second.mix.lambda_ == 0.2
    assert not second.mix.frozen_embeddings
    assert torch.equal(second.mix.residual, batch.targets + 1)
    sampled = table(values())
    step(IFT(IFTConfig(residual="sample", embeddings="frozen")), sampled, [batch], step=3, seed=1)
    step(IFT(IFTConfig(residual="sample", embeddings="frozen")), sampled, [batch], step=4, seed=1)
    draws = [ask.seed for ask in sampled.asked if ask.want == "sample"]
    assert len(set(draws)) == 2
    assert sampled.asked[1].mix.frozen_embeddings
    frozen = table(values())
    step(IFT(IFTConfig(max_lambda=0.0, embeddings="frozen")), frozen, [batch])
    assert [ask.want for ask in frozen.asked] == ["logps"]
    assert frozen.asked[0].mix.lambda_ == 0.0
    assert frozen.asked[0].mix.frozen_embeddings


def test_lambda_of_a_step(at):
    linear = IFT(IFTConfig(lambda_schedule="linear", min_lambda=0.1, max_lambda=0.5))
    assert [linear.strength(at(step=s)) for s in (0, 2, 4, 9)] == pytest.approx([0.1, 0.3, 0.5, 0.5])
    assert linear.strength(at(step=0, warmup_steps=0)) == 0.5
    noisy = IFT(IFTConfig(lambda_disturb="normal", disturb_std=1.0))
    drawn = [noisy.strength(at(step=s)) for s in range(200)]
    assert drawn == [noisy.strength(at(step=s)) for s in range(200)]
    assert drawn[0] != noisy.strength(at(step=0, seed=1))
    assert min(drawn) == 0.0
    assert max(drawn) <= 1.0
    assert 0.15 < sum(drawn) / 200 < 0.27
    assert noisy.strength(at(step=5, training=False)) == 0.2


def test_losses_of_zero_stay_finite(batch_of):
    batch = batch_of([[0, 1], [2, 3]])
    for side in ("left", "right"):
        for norm in ("L1", "L2", "softmax", "log"):
            losses = torch.tensor([0.0, 0.0, 0.0, 1.0], requires_grad=True)
            config = IFTConfig(propagation_side=side, propagation_norm=norm)
            found = propagated(losses[batch.seq_idx], batch, config)
            found.sum().backward()
            assert found.isfinite().all(), (side, norm)
            assert losses.grad.isfinite().all(), (side, norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"propagation": "eq21"}, "is none of product, linear, none"),
        ({"lambda_schedule": "cosine"}, "is none of null, linear"),
        ({"max_lambda": 1.2}, "max_lambda: 1.2 must be at least 0 and at most 1"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message):
        IFTConfig(**options)
