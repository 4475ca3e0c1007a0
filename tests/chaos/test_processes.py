"""A few cases of the shards about signals and processes; all: ``scripts/chaos.sh kill signal orphans hang locks``."""

from __future__ import annotations

import signal

import pytest
import shard_hang
import shard_kill
import shard_locks
import shard_orphans
import shard_signal
from harness import Harness


@pytest.mark.parametrize(("number", "kills"), [pytest.param(0, 1, marks=pytest.mark.nightly), (1000, 2), (1001, 2)])
def test_a_killed_run_ends_as_if_nobody_had(harness: Harness, number: int, kills: int) -> None:
    """Case 0 goes through torchrun itself; an odd number has slow saves."""
    facts = shard_kill.killed(number, harness, kills=kills, steps=18)
    assert (facts["kills"], facts["real"]) == (kills, number == 0)


@pytest.mark.parametrize("number", [0, 6, pytest.param(13, marks=pytest.mark.nightly)])
def test_a_signal_to_any_process_saves_at_a_boundary(harness: Harness, number: int) -> None:
    shard_signal.signalled(number, harness)


def test_a_signal_before_the_first_step_costs_nothing(harness: Harness) -> None:
    shard_signal.early("1", 0.05, False, harness)


def test_more_signals_do_not_break_the_save(harness: Harness) -> None:
    shard_signal.twice(signal.SIGTERM, False, True, harness)


def test_no_rank_outlives_its_launcher(harness: Harness) -> None:
    shard_orphans.orphaned(2, harness)


@pytest.mark.parametrize(("action", "phase"), [("stop", "forward"), ("exit", "save")])
def test_a_lost_rank_is_named(harness: Harness, action: str, phase: str) -> None:
    shard_hang.lost(action, phase, "zero2", harness, timeout=3.0)


def test_of_eight_starts_one_runs(harness: Harness) -> None:
    shard_locks.eight(harness)


def test_a_second_start_is_told_who_is_there(harness: Harness) -> None:
    shard_locks.second(False, harness)


@pytest.mark.nightly
def test_a_restarted_job_takes_over(harness: Harness) -> None:
    shard_locks.restarted(harness)
