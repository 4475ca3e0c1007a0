"""The quickstart's and the study's trainings compose, start from one another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alignlab.configuration.compose import compose

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import quickstart
import study


@pytest.mark.parametrize("job", study.with_controls(1), ids=lambda job: job.name)
def test_every_training_composes(job) -> None:
    found = compose(values={**quickstart.SHARED, **job.settings, "model": "tiny"}, needs=("model", "data", "objective"))
    assert found.config.train.max_steps == job.settings["train.max_steps"]
    assert found.config.data.options == job.settings["data.options"]


def test_starts_come_before_what_starts_from_them() -> None:
    known: set[str | None] = {None}
    for job in study.with_controls(1):
        assert job.start in known
        known.add(job.name)
    assert {row.job for row in quickstart.ROWS} <= known
    assert {name for _, run, control, _ in study.COMPARED for name in (run, control)} <= known
