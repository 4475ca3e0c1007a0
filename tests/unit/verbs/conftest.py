"""Commands run as a user runs them, in an empty folder, on a model that takes milliseconds a step."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest

from alignlab.cli import main

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object that is all of standard output."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


@pytest.fixture(autouse=True)
def _forked(forked: None) -> None:
    """Ranks, stages and points that a command starts here are forks; starting them for real is tests/unit/cli's."""


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, as a Hugging Face folder."""
    spec = importlib.util.spec_from_file_location("export_cells", HERE / "export_cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("models") / "small"
    module.make_model(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that a module's commands share, with a cache of its own."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def settings(small_model: Path) -> list[str]:
    """A small DPO run: 4 steps of 4 pairs, the rows and the model in every command the same."""
    return [
        f"model={small_model}", "data=sums", "data.options={rows: 24, eval_rows: 4}", "objective=dpo", "engine=local",
        "train.max_steps=4", "train.global_batch_size=4", "optim.learning_rate=1e-2",
    ]  # fmt: skip


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command in this process."""

    def command(*words: str) -> Answer:
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return command


@pytest.fixture
def start(home: Path) -> Callable[..., forks.Started]:
    """Start a command as a process of its own in the module's folder."""

    def command(*words: str) -> forks.Started:
        return forks.start(*words, cwd=home)

    return command
