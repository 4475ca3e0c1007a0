"""The matrix of ``alignlab verify`` for every registered objective, on the built-in world and a small model.

A new objective is here as soon as it is registered.  The ordinary run takes what one process can do; the nightly run
takes every cell (ZeRO, two ranks) with full weights and with LoRA, and every loss of the preference families.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignlab.configuration.compose import compose
from alignlab.equivalence.matrix import Matrix, Result
from alignlab.objectives.dpo import LOSS_TYPES
from alignlab.registry import OBJECTIVES
from alignlab.runs.job import make_objective

OBJECTIVE_NAMES = tuple(OBJECTIVES.names())
ORDINARY = ("micro_batches", "tree", "merge_prompts", "reference", "resume", "export")
LOSSES = [*(("dpo", loss) for loss in LOSS_TYPES if loss != "sft"), ("reward", "eurus")]
"""``sft`` is a term beside others."""
LORA = ("peft=lora", "peft.lora_r=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The small model of the curves, and a cache of its own."""
    spec = importlib.util.spec_from_file_location("curve_cells", Path(__file__).parent / "curve_cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("matrix")
    module.make_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
        yield folder / "model"


def results(model: Path, words: tuple[str, ...], **options: Any) -> dict[str, Result]:
    common = (f"model={model}", "data=sums", "data.options={rows: 40}", "optim.learning_rate=1e-3")
    config = compose([*common, *words], needs=("model", "data", "objective")).config
    with Matrix(config, **options) as matrix:
        matrix.prepare()
        return {result.cell.name: result for result in matrix.run()}


def all_but(found: dict[str, Result], *skipped: str) -> None:
    """Every cell passed, but for those named, which were skipped."""
    wrong = {name: (r.status, r.differences, r.reason) for name, r in found.items() if r.status != "ok"}
    assert {name: entry for name, entry in wrong.items() if entry[0] != "skipped"} == {}
    assert set(wrong) == set(skipped), wrong


def cannot(objective: str, cells: Any) -> list[str]:
    """The cells that mean nothing for an objective on the world's rows."""
    found = []
    if objective in ("sft", "ift", "cpsft", "reward"):
        found.append("reference")
    if objective in ("sft", "ift", "cpsft"):
        found.append("tree")  # one sequence a row
    return [name for name in found if name in cells]


@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_in_one_process(model: Path, objective: str) -> None:
    found = results(model, (f"objective={objective}",), rows=8, steps=2, cells=ORDINARY)
    all_but(found, *cannot(objective, ORDINARY))


@pytest.mark.nightly
@pytest.mark.parametrize("peft", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_whole(model: Path, objective: str, peft: tuple[str, ...]) -> None:
    found = results(model, (f"objective={objective}", *peft), rows=18, steps=3)
    all_but(found, *cannot(objective, found))


@pytest.mark.nightly
@pytest.mark.parametrize(("objective", "loss"), LOSSES)
def test_every_loss_in_one_process(model: Path, objective: str, loss: str) -> None:
    words: tuple[str, ...] = (f"objective={objective}", f"objective.loss_type={loss}")
    if loss == "exo_pair":
        words += ("objective.label_smoothing=0.01",)  # the only one that refuses 0
    found = results(model, words, rows=8, steps=2, cells=ORDINARY)
    needs = make_objective(compose(words).config).needs_reference
    all_but(found, *([] if needs else ["reference"]))
