"""What holds for all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignlab import processes
from alignlab.configuration import groups
from alignlab.launching import supervise
from alignlab.registry import FORMATS, OBJECTIVES, VERIFIERS

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import forks  # noqa: E402
import zygote  # noqa: E402

LONGEST = (
    "invariant/test_curves.py",
    "chaos/test_checkpoints.py",
    "chaos/test_processes.py",
    "distributed/test_engines.py",
    "unit/data/test_planted.py",
    "security/test_network.py",
    "unit/lint/test_lint.py",
    "chaos/test_numerics.py",
    "unit/configuration/test_compose.py",
    "unit/verbs/test_evaluate_rewards.py",
    "distributed/test_scorer.py",
    "unit/objectives/test_invariants.py",
)
"""The files of fifteen seconds and more, the longest first.  Files are handed out whole and in order: a long one that
came last would keep one processor busy while the others have nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they were collected."""
    place = {HERE / name: number for number, name in enumerate(LONGEST)}
    if gone := [str(path) for path in place if not path.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(gone)}")
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="module", autouse=True)
def _what_a_file_registers_ends_with_it() -> Iterator[None]:
    """A plug-in that a command loads in this process stays registered: no other file's tests shall meet it."""
    registries = (FORMATS, OBJECTIVES, VERIFIERS)
    before = [dict(registry._entries) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)
    groups.options.cache_clear()


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What alignlab starts of itself in this test, points of a sweep, stages, ranks, comes from the zygote."""
    for module in (processes, supervise):
        monkeypatch.setattr(module, "subprocess", zygote.Subprocess(forks.from_zygote))
