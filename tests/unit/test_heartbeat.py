"""Signs of life: what a rank leaves behind, and who is waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignlab import heartbeat
from alignlab.heartbeat import Beat


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    heartbeat.end()


def test_a_record_says_where_the_rank_is(tmp_path: Path) -> None:
    heartbeat.start(tmp_path, 3)
    (found,) = heartbeat.read(tmp_path)
    assert (found.rank, found.pid, found.phase, found.place) == (3, os.getpid(), "load", "load")
    heartbeat.at(7)
    heartbeat.phase("forward")
    (found,) = heartbeat.read(tmp_path)
    assert (found.step, found.done, found.place, found.ended) == (7, 6, "step 7, forward", False)
    assert abs(found.since - time.time()) < 60
    heartbeat.end()
    assert heartbeat.read(tmp_path)[0].ended
    heartbeat.clear(tmp_path)
    assert heartbeat.read(tmp_path) == []


def test_what_happens_inside_an_evaluation_is_the_evaluation(tmp_path: Path) -> None:
    heartbeat.start(tmp_path, 0)
    with heartbeat.doing("eval"):
        heartbeat.phase("forward")
        (found,) = heartbeat.read(tmp_path)
        assert (found.phase, found.beats) == ("eval", 2)
    heartbeat.phase("data")
    assert heartbeat.read(tmp_path)[0].phase == "data"


def test_a_shorter_record_covers_a_longer_one(tmp_path: Path) -> None:
    heartbeat.start(tmp_path, 0)
    for name in ("reference" * 4, "data"):
        heartbeat.phase(name)
        assert heartbeat.read(tmp_path)[0].phase == name


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    heartbeat.start(tmp_path / "nowhere", 0)
    heartbeat.phase("forward")
    assert heartbeat.now.phase == "forward"
    (tmp_path / "heartbeat_1.json").write_text("{")
    assert heartbeat.read(tmp_path) == []


def test_the_rank_that_is_waited_for() -> None:
    waiting = Beat(0, step=3, phase="update", beats=9, since=10.0)
    hung = Beat(1, step=3, phase="forward", beats=7, since=11.0)
    left = Beat(2, step=3, phase="data", beats=5, ended=True)
    assert heartbeat.missing([waiting, hung, left]) == hung
    assert heartbeat.missing([left]) is None


def test_a_beat_costs_microseconds(tmp_path: Path) -> None:
    heartbeat.start(tmp_path, 0)
    begun = time.perf_counter()
    for _ in range(2000):
        heartbeat.phase("forward")
    assert (time.perf_counter() - begun) / 2000 < 1e-3
