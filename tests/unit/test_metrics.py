"""Statistics add by component, whatever the way they are cut."""

from __future__ import annotations

import pytest
import torch

from alignlab.metrics import Meter, finish, stat

CPU = torch.device("cpu")


def finished(meter: Meter) -> dict[str, float]:
    return finish(meter.names, meter.stacked(meter.names, CPU))


def test_micro_batches_give_the_weighted_mean_of_the_whole() -> None:
    torch.manual_seed(0)
    values, weights = torch.randn(12), torch.rand(12)
    meter, other = Meter(), Meter()
    meter.add({"a": stat(values[:5], weights[:5])})
    other.add({"a": stat(values[5:], weights[5:]), "b": stat(values)})
    meter.merge(other)
    assert finished(meter)["a"] == pytest.approx(((values * weights).sum() / weights.sum()).item(), rel=1e-6)
    assert finished(meter)["b"] == pytest.approx(values.mean().item(), rel=1e-6)


def test_a_filler_leaves_no_trace_but_its_names() -> None:
    meter = Meter()
    meter.add({"a": stat(torch.tensor([2.0]))})
    meter.add({"a": stat(torch.tensor([100.0])), "b": stat(torch.tensor([1.0]))}, weight=0.0)
    assert meter.names == ["a", "b"], "every rank must stack the same names"
    assert finished(meter) == {"a": 2.0}


def test_sums_do_not_carry_a_gradient_and_a_reset_forgets() -> None:
    meter = Meter()
    meter.add({"a": stat(torch.ones(2, requires_grad=True))})
    assert not meter.stacked(["a", "never"], CPU).requires_grad
    assert meter.stacked(["a", "never"], CPU).tolist() == [[2.0, 2.0], [0.0, 0.0]]
    meter.reset()
    assert meter.names == []
