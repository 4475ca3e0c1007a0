"""What a start waits for: libraries that a run may never need are imported where they are used."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from alignlab.data.ledger import SAMPLES_FILE, SampleWriter, StepLedger
from alignlab.data.random_trees import random_sample, write_index
from alignlab.imports import collectable, importing
from alignlab.types import Unit

LATER = ("deepspeed", "peft", "wandb", "tensorboard", "matplotlib", "pandas", "datasets", "trl", "bitsandbytes", "rich")


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """A folder with an index and its sample table."""
    import numpy as np

    rng = np.random.default_rng(0)
    index = write_index(tmp_path / "index", [random_sample(rng, number) for number in range(3)])
    with SampleWriter(tmp_path / SAMPLES_FILE, Unit.PAIR) as writer:
        for number in range(3):
            writer.kept(number + 1, {"file": "x", "line": number + 1}, [index.sample(number)], {})
    assert len(StepLedger(tmp_path / "here", tmp_path / SAMPLES_FILE, index, Unit.PAIR, 0)._hashes) == 3
    return tmp_path


def test_a_start_imports_nothing_that_it_does_not_need(account: Path) -> None:
    """All that a worker imports, and the accounts of a run that begins: pandas alone takes half a second there."""
    code = f"""
import sys
from pathlib import Path
from types import SimpleNamespace as Some
import torch
import alignlab.worker
from alignlab.data.index import Index
from alignlab.data.ledger import StepLedger
from alignlab.train.margins import MarginRecorder
from alignlab.types import Unit
folder = Path(sys.argv[1])
index = Index.open(folder / "index")
StepLedger(folder / "ledger", folder / {SAMPLES_FILE!r}, index, Unit.PAIR, 0)
margins = MarginRecorder(Some(device="cpu", gather=lambda values: values), folder / "ledger", index, 0)
batch = Some(weight=1.0, sequence_ids=torch.arange(2), pairs=torch.tensor([[0, 1]]))
margins.add(1, batch, Some(margins=torch.ones(1)))
margins.gather()
margins.flush()
print(*sorted({set(LATER)!r} & set(sys.modules)))
"""
    told = subprocess.run([sys.executable, "-c", code, str(account)], capture_output=True, text=True, check=True)
    assert told.stdout.split() == []


def test_imports_are_not_walked_through_and_a_callers_cycles_are_collected_again() -> None:
    class Node:
        def __init__(self) -> None:
            self.self = self

    gone: list[int] = []
    with collectable():
        with importing():
            assert not gc.isenabled()
            weakref.finalize(Node(), gone.append, 1)
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        gc.collect()
        assert gone == []
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert gone == [1]


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_the_command_line_answers_without_torch() -> None:
    code = "import sys; from alignlab.cli import main; main(['--help']); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "False"
