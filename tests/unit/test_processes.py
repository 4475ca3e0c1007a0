"""Stop signals, and the wait for a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab.processes import STOP_SIGNALS, StopFlag, wait


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    stop = StopFlag()
    before = signal.getsignal(number)
    with stop.installed():
        assert not stop()
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop()
        assert stop.number == number
    assert signal.getsignal(number) == before


def test_an_inner_flag_learns_what_the_outer_one_got_and_hands_back() -> None:
    outer, inner = StopFlag(), StopFlag()
    with outer.installed():
        os.kill(os.getpid(), signal.SIGUSR1)
        with inner.installed():
            assert inner.number == signal.SIGUSR1
    later = StopFlag()
    with later.installed():
        with StopFlag().installed():
            os.kill(os.getpid(), signal.SIGUSR2)
        assert later.number == signal.SIGUSR2


def test_the_second_ctrl_c_ends_a_process_that_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with StopFlag().installed() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


COUNTS = """
import pathlib, signal, sys, time
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
pathlib.Path(sys.argv[1]).touch()
while not got:
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(len(got))
"""


def test_only_the_first_signal_is_passed_on(tmp_path: Path) -> None:
    """torchrun, told twice, would stop waiting for ranks that save."""
    ready = tmp_path / "ready"
    child = subprocess.Popen([sys.executable, "-c", COUNTS, str(ready)])
    with StopFlag().installed() as stop:

        def more() -> bool:
            if ready.exists():
                os.kill(os.getpid(), signal.SIGUSR1)
            return True

        assert wait(child, stop, more) == 1


def test_a_child_does_not_outlive_the_wait() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def broken() -> bool:
        raise OSError("the watch failed")

    with pytest.raises(OSError, match="the watch"):
        wait(child, StopFlag(), broken)
    assert child.returncode == -signal.SIGKILL
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert wait(other, StopFlag(), lambda: False) == -signal.SIGKILL
