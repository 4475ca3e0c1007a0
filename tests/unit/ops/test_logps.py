"""Chunked log-probabilities, greedy tokens and draws against all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignlab.ops import logps
from alignlab.ops.logps import LogitTransform

VOCABULARY, WIDTH = 13, 5


def made(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (rows,), generator=generator), weight, bias


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 8])
@pytest.mark.parametrize("transform", [None, LogitTransform(0.5), LogitTransform(2.0, 3.0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunks_of_four_rows_equal_all_at_once(rows: int, transform: LogitTransform | None, with_bias: bool) -> None:
    hidden, targets, weight, bias = made(rows)
    options = (weight, bias if with_bias else None, transform)
    found = logps.chunked_logps(hidden, targets, *options, chunk=4 * VOCABULARY)
    expected = logps.naive_logps(hidden, targets, *options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    parameters = [hidden, weight, *([bias] if with_bias else [])]
    factors = torch.linspace(-1, 2, rows, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * factors).sum(), parameters),
        torch.autograd.grad((expected * factors).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_the_softmax_is_float32_at_least() -> None:
    hidden, targets, weight, bias = made(6, torch.bfloat16)
    assert logps.chunked_logps(hidden, targets, weight).dtype == torch.float32
    assert logps.chunked_logps(*made(2)[:3]).dtype == torch.float64
    # The product itself is bfloat16's, as the model's own output layer computes it.
    expected = torch.nn.functional.linear(hidden, weight, bias).float().log_softmax(-1)
    torch.testing.assert_close(
        logps.chunked_logps(hidden, targets, weight, bias), expected.gather(1, targets[:, None])[:, 0]
    )


def test_one_chunk_of_logits_is_alive() -> None:
    rows, vocabulary = 64, 1000
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logps.chunked_logps(hidden, torch.zeros(rows, dtype=torch.int64), weight, chunk=4 * vocabulary)
    # Each chunk keeps its inputs (4 x 8 hidden and the weight that all share), never 4 x 1000 logits of its own.
    inputs = 16 * (4 * 8 + 4) + 16 * vocabulary * 8
    assert kept <= inputs
    kept = 0
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logps.naive_logps(hidden, torch.zeros(rows, dtype=torch.int64), weight)
    assert kept >= rows * vocabulary


def test_greedy() -> None:
    hidden, _, weight, bias = made(9)
    found = logps.chunked_argmax(hidden, weight, bias, chunk=2 * VOCABULARY)
    assert found.tolist() == (hidden @ weight.T + bias).argmax(-1).tolist()
    assert not found.requires_grad


def test_draws_follow_the_distribution() -> None:
    hidden, _, weight, _ = made(1)
    transform = LogitTransform(1.5, 4.0)
    count = 20_000
    uniforms = logps.uniforms(torch.arange(count), seed=3)
    found = logps.chunked_sample(hidden.expand(count, -1), uniforms, weight, None, transform, chunk=999 * VOCABULARY)
    expected = transform(hidden @ weight.T).softmax(-1)[0]
    frequency = torch.bincount(found, minlength=VOCABULARY) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequency - expected).abs() <= 5 * deviation + 1e-9).all()


def test_draws_at_the_ends_are_tokens() -> None:
    hidden, _, weight, _ = made(2)
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    found = logps.chunked_sample(hidden, ends, weight)
    assert ((found >= 0) & (found < VOCABULARY)).all()


def test_numbers_are_keyed_and_uniform() -> None:
    keys = torch.arange(-5000, 5000)
    one, other = logps.uniforms(keys, 0), logps.uniforms(keys, 1)
    assert torch.equal(logps.uniforms(keys.flip(0), 0), one.flip(0))
    assert one.min() >= 0
    assert one.max() < 1
    assert one.unique().numel() == keys.numel()
    for sample in (one, other):
        # The largest gap between the empirical and the uniform distribution: 1.63 / sqrt(n) is the 1 % limit.
        gap = (sample.sort().values - (torch.arange(len(keys)) + 0.5) / len(keys)).abs().max()
        assert gap < 1.63 / len(keys) ** 0.5
    correlation = torch.corrcoef(torch.stack((one, other)))[0, 1]
    assert abs(correlation) < 4 / len(keys) ** 0.5


def test_scramble_is_splitmix64() -> None:
    # The first two outputs of SplitMix64 seeded with 1234567: its finalizer at seed + n * 0x9E3779B97F4A7C15.
    mask = 2**64 - 1
    states = [(1234567 + n * 0x9E3779B97F4A7C15) & mask for n in (1, 2)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [value & mask for value in logps.scramble(signed).tolist()] == [6457827717110365317, 3203168211198807973]
