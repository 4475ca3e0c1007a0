"""Trackers and hubs that are down; ``scripts/chaos.sh services`` runs all cases."""

from __future__ import annotations

import pytest
from harness import Harness
from run import cases_of

ORDINARY = ("tensorboard-unwritable", "tracker-raises")


def _slow() -> list[str]:
    return [case.id for case in cases_of("services") if case.id not in ORDINARY]


@pytest.mark.parametrize("name", [*ORDINARY, *(pytest.param(name, marks=pytest.mark.nightly) for name in _slow())])
def test_a_service_that_is_down_changes_nothing(name: str, harness: Harness) -> None:
    (case,) = (case for case in cases_of("services") if case.id == name)
    case.run(harness)
