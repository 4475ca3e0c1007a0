"""Trackers are guests: whatever they do, the run goes on, and metrics.jsonl has every figure."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignlab.config import LoggerConfig
from alignlab.errors import StorageError
from alignlab.train import logging
from alignlab.train.logging import BestEffort, JsonLines, make_sinks


class Broken:
    """Fails at the records of ``bad``, and at its end when asked to."""

    def __init__(self, bad: tuple[int, ...] = (), at_end: bool = False) -> None:
        self.bad, self.at_end, self.taken = bad, at_end, []  # type: ignore[var-annotated]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if step in self.bad:
            raise RuntimeError("no\nroom")
        self.taken.append(step)

    def close(self) -> None:
        if self.at_end:
            raise TimeoutError("not all was sent")


def best_effort(sink: object) -> tuple[BestEffort, list[str]]:
    said: list[str] = []

    def make() -> Broken:
        if isinstance(sink, Exception):
            raise sink
        return sink  # type: ignore[return-value]

    return BestEffort("tracker", make, lambda head, text: said.append(f"{head} {text}")), said


def test_a_tracker_that_cannot_be_made_is_said_once() -> None:
    sink, said = best_effort(OSError("read-only"))
    for step in range(3):
        sink.write(step, {"loss": 1.0})
    sink.close()
    assert said == ["tracker cannot be used (OSError: read-only); the run goes on, metrics.jsonl has all figures"]


def test_records_that_are_not_taken_are_said_once_and_counted() -> None:
    broken = Broken(bad=(1, 2))
    sink, said = best_effort(broken)
    for step in range(5):
        sink.write(step, {"loss": 1.0})
    sink.close()
    assert broken.taken == [0, 3, 4], "it may come back"
    assert said == [
        "tracker failed at step 1 (RuntimeError: no); the run goes on, metrics.jsonl has it",
        "tracker 2 of 5 records were not taken; metrics.jsonl has all figures",
    ]


def test_an_end_that_fails_is_said() -> None:
    sink, said = best_effort(Broken(at_end=True))
    sink.close()
    assert said == ["tracker TimeoutError: not all was sent; metrics.jsonl has all figures"]


def test_an_end_that_never_comes_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "FINISH_SECONDS", -4.9)
    broken, never = Broken(), threading.Event()
    broken.close = lambda: never.wait(20)  # type: ignore[method-assign, assignment, return-value]
    sink, said = best_effort(broken)
    begun = time.monotonic()
    sink.close()
    assert time.monotonic() - begun < 10
    assert said == ["tracker did not finish; metrics.jsonl has all figures"]
    never.set()


def test_a_wandb_that_cannot_be_reached_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        """As wandb 0.31: a start that failed keeps the run's id until the service is torn down."""

        held = ""

        @staticmethod
        def Settings(**keys: object) -> SimpleNamespace:
            return SimpleNamespace(**keys)

        def teardown(self) -> None:
            self.held = ""

        def init(self, *, mode: str, id: str, dir: str, settings: SimpleNamespace, **_: object) -> SimpleNamespace:
            assert self.held != id, "run ID is in use"
            self.held = id
            if mode == "online":
                assert settings.init_timeout <= 15
                raise ConnectionError("refused")
            return SimpleNamespace(settings=SimpleNamespace(sync_dir=f"{dir}/wandb/offline-run"))

    monkeypatch.setitem(sys.modules, "wandb", Fake())
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said: list[str] = []
    config = LoggerConfig(names=["jsonl", "wandb"])
    make_sinks(config, tmp_path, 1, "run", {}, lambda head, text: said.append(f"{head} {text}"))
    sync = f"wandb sync {tmp_path}/wandb/offline-run"
    assert said == [f"wandb cannot be reached (ConnectionError: refused); writing offline; later: {sync}"]


def test_numbers_that_are_not_finite_survive_json(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", attempt=1)
    sink.write(1, {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "fine": 0.5})
    sink.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"step": 1, "attempt": 1, "loss": "nan", "grad_norm": "inf", "low": "-inf", "fine": 0.5}
    assert math.isnan(float(row["loss"]))


@pytest.mark.parametrize("before", ["", '{"step": 1}\n', '{"step": 1}\n{"st'])
def test_a_line_that_a_kill_has_cut_spoils_no_other(before: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(before)
    sink = JsonLines(path, attempt=2)
    sink.write(2, {"loss": 1.0})
    sink.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 2, "attempt": 2, "loss": 1.0}
    assert path.read_text().startswith(before)
    assert path.read_text().count("\n") == before.count("\n") + 1 + (not before.endswith(("\n",)) and bool(before))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error() -> None:
    sink = JsonLines(Path("/dev/full"), attempt=1)
    with pytest.raises(StorageError, match="No space left"):
        sink.write(1, {"loss": 1.0})
