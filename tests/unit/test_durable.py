"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from alignlab import durable
from alignlab.durable import write_atomic, write_named
from alignlab.errors import StorageError


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_atomic(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    write_atomic(file, b"\x89")
    assert file.read_bytes() == b"\x89"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("write", [write_atomic, lambda path, content: write_named("plot", path, content)])
def test_a_disk_that_fills_leaves_the_old_content_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object
) -> None:
    file = tmp_path / "a"
    file.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(StorageError, match=r"a: cannot be written \(No space left on device\)"):
        write(file, "new")  # type: ignore[operator]
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_named_file_gets_its_folders(tmp_path: Path) -> None:
    write_named("plot", tmp_path / "one" / "two" / "a.png", b"x")
    assert (tmp_path / "one" / "two" / "a.png").read_bytes() == b"x"


def test_a_named_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real"
    target.write_text("old")
    (tmp_path / "link").symlink_to(target)
    write_named("--json", tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert target.read_text() == "new"


def test_a_named_pipe_is_written_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()), daemon=True)
    reader.start()
    write_named("--json", pipe, "said")
    reader.join(10)
    assert heard == ["said"]
    assert pipe.is_fifo()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"plot: .* cannot be written \(Is a directory\)"):
        write_named("plot", tmp_path, b"x")
