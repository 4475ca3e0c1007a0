"""Stages are done once, go on after an interruption, and are never silently reused for other inputs."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import ConfigError, NumericsError, Preempted
from alignlab.processes import StopFlag
from alignlab.stages import Shared, Stage, run_shared, run_stages


class Work:
    """Three stages that count their calls; ``fails`` names one that breaks."""

    def __init__(self, fails: str = "", **inputs: Any) -> None:
        self.calls: list[str] = []
        self.fails, self.inputs = fails, inputs

    def stages(self) -> list[Stage]:
        return [self.stage(name) for name in ("one", "two", "deep/three")]

    def stage(self, name: str) -> Stage:
        def work(folder: Path) -> dict[str, Any]:
            self.calls.append(name)
            (folder / "trace").write_text(name)
            if name == self.fails:
                raise KeyboardInterrupt
            return {"made": name}

        return Stage(name, {"name": name, **({"x": self.inputs.get(name)} if name in self.inputs else {})}, work)


def test_the_same_command_goes_on_with_the_first_unfinished_stage(tmp_path: Path) -> None:
    first = Work(fails="two")
    with pytest.raises(KeyboardInterrupt):
        run_stages(tmp_path, first.stages())
    assert first.calls == ["one", "two"]
    said: list[tuple[str, bool]] = []
    second = Work()
    results = run_stages(tmp_path, second.stages(), lambda name, new, seconds: said.append((name, new)))
    assert second.calls == ["two", "deep/three"]
    assert said == [("one", False), ("two", True), ("deep/three", True)]
    assert results == {name: {"made": name} for name in ("one", "two", "deep/three")}
    third = Work()
    assert run_stages(tmp_path, third.stages()) == results
    assert third.calls == []


def test_other_inputs_are_named_and_nothing_is_lost(tmp_path: Path) -> None:
    run_stages(tmp_path, Work(two=1).stages())
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    changed = Work(two=2)
    with pytest.raises(ConfigError, match=r"two: was made otherwise \(x 1 -> 2\)"):
        run_stages(tmp_path, changed.stages())
    assert changed.calls == []
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_stage_is_done_again_only_after_what_it_came_from(tmp_path: Path) -> None:
    """One stage is removed and made otherwise: those behind it, made from the old one, are not taken for the new."""
    run_stages(tmp_path, Work(one=1).stages())
    (tmp_path / "one" / "stage.json").unlink()
    with pytest.raises(ConfigError, match=r"two: was made otherwise \(a stage before it was"):
        run_stages(tmp_path, Work(one=2).stages())


def test_a_record_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    run_stages(tmp_path, Work().stages())
    (tmp_path / "one" / "stage.json").write_text(json.dumps({"key": "x"})[:-3])
    with pytest.raises(ConfigError, match=r"stage\.json: cannot be read"):
        run_stages(tmp_path, Work().stages())


NEEDS = {"a": "", "b": "a", "c": "a", "d": "bc", "e": ""}
"""``a`` before ``b`` and ``c``, both before ``d``; ``e`` stands alone."""


class Graph:
    """Stages as in :data:`NEEDS`, whose work notes that it began and how many were at work together."""

    def __init__(self, home: Path, fails: str = "", seconds: float = 0.0) -> None:
        self.home, self.fails, self.seconds = home, fails, seconds
        self.began: list[str] = []
        self.said: list[str] = []
        self.most = self.busy = 0
        self.lock = threading.Lock()

    def stages(self) -> list[Shared]:
        return [
            Shared(self.home / name, f"key-{name}", {"name": name}, tuple(self.home / n for n in needs), self.work)
            for name, needs in reversed(NEEDS.items())
        ]

    def work(self, folder: Path) -> dict[str, Any]:
        with self.lock:
            self.began.append(folder.name)
            self.busy += 1
            self.most = max(self.most, self.busy)
        for need in NEEDS[folder.name]:
            assert (self.home / need / "stage.json").exists()
        time.sleep(self.seconds)
        with self.lock:
            self.busy -= 1
        if folder.name == self.fails:
            raise NumericsError(f"{folder.name} is not finite")
        return {"made": folder.name}

    def run(self, workers: int = 2, stop: StopFlag | None = None) -> tuple[list[str], dict[str, str]]:
        done, failed = run_shared(
            self.stages(), workers, stop or StopFlag(), lambda s, what, _: self.said.append(f"{s.folder.name} {what}")
        )
        return sorted(path.name for path in done), {path.name: str(error) for path, error in failed.items()}


def test_stages_come_after_what_they_need_and_several_at_once(tmp_path: Path) -> None:
    graph = Graph(tmp_path, seconds=0.15)
    assert graph.run(workers=2) == (list("abcde"), {})
    assert sorted(graph.began) == list("abcde")
    assert graph.began.index("d") == 4
    assert graph.most == 2
    again = Graph(tmp_path)
    assert again.run() == (list("abcde"), {})
    assert again.began == []
    assert sorted(again.said) == [f"{name} done before" for name in "abcde"]


def test_a_failure_stops_what_needs_it_alone_and_the_same_command_goes_on(tmp_path: Path) -> None:
    first = Graph(tmp_path, fails="b")
    done, failed = first.run()
    assert done == ["a", "c", "e"]
    assert failed == dict.fromkeys("bd", "b is not finite")
    assert "b failed: b is not finite" in first.said
    second = Graph(tmp_path)
    assert second.run() == (list("abcde"), {})
    assert second.began == ["b", "d"]


def test_two_at_once_do_each_stage_once(tmp_path: Path) -> None:
    """Two commands on the same folders: a stage that the other is doing is waited for, and its result taken."""
    both = [Graph(tmp_path, seconds=0.2), Graph(tmp_path, seconds=0.2)]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda graph=graph: found.append(graph.run())) for graph in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(list("abcde"), {})] * 2
    assert sorted(both[0].began + both[1].began) == list("abcde")
    assert any("waits for process" in text for graph in both for text in graph.said)
    assert not list(tmp_path.glob("*.lock"))


def test_after_a_stop_nothing_new_begins(tmp_path: Path) -> None:
    stop = StopFlag()
    graph = Graph(tmp_path)
    work = graph.work

    def stopped(folder: Path) -> dict[str, Any]:
        stop.number = 15
        return work(folder)

    graph.work = stopped  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="the same command goes on"):
        graph.run(workers=1, stop=stop)
    assert len(graph.began) == 1
    assert Graph(tmp_path).run() == (list("abcde"), {})


def test_a_folder_with_another_stage_is_refused(tmp_path: Path) -> None:
    Graph(tmp_path).run()
    record = json.loads((tmp_path / "a" / "stage.json").read_text())
    (tmp_path / "a" / "stage.json").write_text(json.dumps({**record, "key": "other"}))
    with pytest.raises(ConfigError, match="holds another stage"):
        Graph(tmp_path).run()
