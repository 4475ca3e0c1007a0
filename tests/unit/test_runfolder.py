"""What ``status.json`` says of an exit code."""

from __future__ import annotations

import pytest

from alignlab.errors import AlignlabError, Preempted
from alignlab.runfolder import state_of


@pytest.mark.parametrize(("code", "state"), [(0, "done"), (2, "failed"), (AlignlabError.exit_code, "failed")])
def test_state_of_an_exit_code(code: int, state: str) -> None:
    assert state_of(code) == state
    assert state_of(Preempted.exit_code) == "preempted"
