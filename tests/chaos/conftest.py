"""One model and one cache for all chaos tests of a session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import Harness


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """Makes runs, hurts them, compares them."""
    with Harness(tmp_path_factory.mktemp("chaos")) as made:
        yield made
