"""A few cases of the shards ``nonfinite`` and ``memory``; ``scripts/chaos.sh`` runs all."""

from __future__ import annotations

import pytest
from harness import Harness
from run import cases_of

NONFINITE = (
    "fp32-local-rank1-inf_loss", "bf16-zero2-rank1-nan_gradient", "fp32-zero3-rank0-overflow",
    "bf16-zero0-rank1-nan_loss", "evaluation-stop-zero3", "reference-local",
)  # fmt: skip
MEMORY = ("train-oom-zero2", "evaluation-limit_as-local", "reference-oom-local")


@pytest.mark.parametrize("name", NONFINITE)
def test_numbers_that_are_not_finite_have_one_outcome(name: str, harness: Harness) -> None:
    (case,) = (case for case in cases_of("nonfinite") if case.id == name)
    case.run(harness)


@pytest.mark.parametrize("name", MEMORY)
def test_a_row_that_does_not_fit_ends_the_job_with_its_id_and_length(name: str, harness: Harness) -> None:
    (case,) = (case for case in cases_of("memory") if case.id == name)
    case.run(harness)


def test_there_are_as_many_cases_as_the_goal_asks_for() -> None:
    assert len([case for case in cases_of("nonfinite") if case.id.startswith(("fp32", "bf16"))]) == 80
