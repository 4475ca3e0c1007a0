"""Which rank says how a run ended, when several fail at once or after one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignlab import heartbeat, worker
from alignlab.errors import ConfigError, NumericsError, Preempted
from alignlab.runfolder import RunFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    found = RunFolder(tmp_path)
    found.write_status(state="running", step=7)
    monkeypatch.setattr(worker, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(heartbeat, "now", heartbeat.Beat())  # of a process that has done no step
    return found


def as_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")


def ending(folder: RunFolder) -> tuple[str, object]:
    status = json.loads(folder.status_json.read_text())
    assert status["step"] == 7
    return status["state"], status.get("exit_code")


def test_a_rank_that_failed_alone_speaks(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(1, monkeypatch)
    assert worker._failed(folder, NumericsError("loss nan")) == 3
    assert ending(folder) == ("failed", 3)
    as_rank(0, monkeypatch)  # all that rank 0 sees is that rank 1 has gone
    assert worker._failed(folder, RuntimeError("Connection closed by peer [127.0.0.1]:29500")) == 5
    assert ending(folder) == ("failed", 3)


def test_rank_0_speaks_for_all_and_for_one_that_died_without_a_word(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(0, monkeypatch)
    worker._failed(folder, RuntimeError("Connection closed by peer [127.0.0.1]:29500"))
    assert ending(folder) == ("failed", 5)
    worker._failed(folder, ConfigError("ranks disagree"))
    as_rank(1, monkeypatch)
    worker._failed(folder, NumericsError("loss nan"))
    assert ending(folder) == ("failed", 2)


def test_a_stop_is_written_by_rank_0_alone(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 would write what it read before rank 0 noted the checkpoint."""
    as_rank(1, monkeypatch)
    assert worker._failed(folder, Preempted("stopped at step 7 of 9")) == 75
    assert ending(folder) == ("running", None)
    as_rank(0, monkeypatch)
    worker._failed(folder, Preempted("stopped at step 7 of 9"))
    assert ending(folder) == ("preempted", 75)
