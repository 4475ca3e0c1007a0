"""Ragged sums against loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.ops import segments


def naive_suffix(values: torch.Tensor, ptr: list[int], gamma: float, depth: list[int]) -> torch.Tensor:
    rows = []
    for start, end in itertools.pairwise(ptr):
        for t in range(start, end):
            rows.append(sum(gamma ** (depth[j] - depth[t]) * values[j] for j in range(t, end)))
    return torch.stack(rows) if rows else values


def naive_prefix(values: torch.Tensor, ptr: list[int], gamma: float, depth: list[int]) -> torch.Tensor:
    rows = []
    for start, end in itertools.pairwise(ptr):
        for t in range(start, end):
            rows.append(sum(gamma ** (depth[t] - depth[j]) * values[j] for j in range(start, t + 1)))
    return torch.stack(rows) if rows else values


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    gamma=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    gaps=st.booleans(),
    seed=st.integers(0, 99),
)
def test_discounted_sums_equal_loops(lengths: list[int], gamma: float, gaps: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ptr = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=generator)
    steps = torch.randint(1, 4 if gaps else 2, (len(values),), generator=generator)
    depth = steps.cumsum(0)
    given_depth = depth if gaps else None
    found = segments.suffix_discounted_sum(values, ptr, gamma, given_depth)
    torch.testing.assert_close(found, naive_suffix(values, ptr.tolist(), gamma, depth.tolist()), rtol=1e-12, atol=1e-12)
    found = segments.prefix_discounted_sum(values, ptr, gamma, given_depth)
    torch.testing.assert_close(found, naive_prefix(values, ptr.tolist(), gamma, depth.tolist()), rtol=1e-12, atol=1e-12)


def test_sums_least_and_greatest() -> None:
    seq_of = torch.tensor([0, 0, 2, 2, 2])
    values = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0])
    assert segments.segment_sum(values, seq_of, 3).tolist() == [-1.0, 0.0, 7.5]
    assert segments.segment_min(values, seq_of, 3).tolist() == [-2.0, torch.inf, 0.5]
    assert segments.segment_max(values, seq_of, 3).tolist() == [1.0, -torch.inf, 4.0]
    assert segments.segment_counts(torch.tensor([0, 2, 2, 5])).tolist() == [2, 0, 3]


@pytest.mark.parametrize("name", ["suffix_discounted_sum", "prefix_discounted_sum"])
def test_gradients(name: str) -> None:
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ptr, depth = torch.tensor([0, 3, 3, 7]), torch.tensor([2, 3, 6, 1, 2, 3, 7])
    assert torch.autograd.gradcheck(lambda v: getattr(segments, name)(v, ptr, 0.9, depth), values)


def test_long_segments_keep_precision_in_float32() -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 0.5
    ptr = torch.tensor([0, 20_000])
    for gamma in (0.95, 1.0):
        found = segments.suffix_discounted_sum(values, ptr, gamma)
        exact = segments.suffix_discounted_sum(values.double(), ptr, gamma)
        assert ((found - exact).abs() / exact).max() < 1e-5
