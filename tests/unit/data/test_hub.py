"""Hub data sets: fetched once, pinned, and read from the cache without a connection ever after."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from alignlab.data import hub
from alignlab.data.rows import fingerprint, read_rows
from alignlab.errors import DataError

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": "1 + 1", "completion": "2"}, {"prompt": "2 + 2", "completion": "4"}]


class FakeHub:
    """Stands in for the hub: counts what it is asked; its rows may change."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows, self.asked = list(ROWS), []  # type: ignore[var-annotated]
        patch.setattr(datasets, "load_dataset", self.load)
        patch.setattr(hub, "commit", lambda kind, name, revision=None: f"commit-{len(self.rows)}")

    def load(self, name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        self.asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(self.rows)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return FakeHub(monkeypatch)


def test_a_hub_data_set_is_asked_for_once(fake: FakeHub) -> None:
    first = fingerprint("owner/set:small", "test")
    rows = list(read_rows("owner/set:small", split="test"))
    assert [row.value for row in rows] == ROWS
    assert [(row.file, row.line) for row in rows] == [("owner/set:small[test]", 1), ("owner/set:small[test]", 2)]
    fake.rows.append({"prompt": "3 + 3", "completion": "6"})
    assert fingerprint("owner/set:small", "test") == first, "the first commit stays: the same rows in every job"
    assert len(list(read_rows("owner/set:small", split="test"))) == 2
    assert fake.asked == [("owner/set", "small", "test", "commit-2")]
    assert fingerprint("owner/set:small", "train") != first
    assert len(fake.asked) == 2


def test_what_was_not_fetched_is_named(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> str:
        raise OSError("timed out")

    monkeypatch.setattr(hub, "commit", gone)
    with pytest.raises(DataError, match=r"owner/set: no such file.* cannot be loaded \(timed out\)"):
        list(read_rows("owner/set"))
    assert not fake.asked


@pytest.mark.parametrize("silent", [False, True])
def test_a_hub_that_does_not_answer_is_known_in_seconds(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 1.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        monkeypatch.setattr(huggingface_hub.HfApi, "__init__", _at(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"(Connect|Timeout|refused|timed out)"):
            hub.commit("dataset", "owner/set")
        assert time.monotonic() - begun < 20


def _at(endpoint: str) -> Any:
    import huggingface_hub

    original = huggingface_hub.HfApi.__init__

    def made(self: Any, *rest: Any, **options: Any) -> None:
        original(self, *rest, **{**options, "endpoint": endpoint})

    return made
