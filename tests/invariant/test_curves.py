"""Twenty steps of the whole trainer give one curve, whatever engine, rank count, cut, layout or interruption.

Everything is fp32 on a CPU.  All cells of one world size run in one launch (``curve_cells.py``).
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from alignlab.registry import OBJECTIVES

HERE = Path(__file__).parent
TOLERANCE = 1e-4
"""Relative, of every loss and every gradient norm."""
ENGINES = ("zero0", "zero1", "zero2", "zero3")
OBJECTIVE_NAMES = tuple(OBJECTIVES.names())
FAMILIES = ("dpo", "ift", "kto", "reward", "sft")
"""One of each kind: pairs with a reference, mixed inputs, statistics of the whole step, scalar head, plain tokens."""
CUTS = {
    "packed": ["model.layout=packed"],
    "rows": ["model.layout=rows"],
    "budget": ["train.token_budget=150"],
    "checkpointing": ["train.gradient_checkpointing=true"],
}
NIGHTLY_CUTS = {
    "packed, budget": ["model.layout=packed", "train.token_budget=150"],
    "rows, budget": ["model.layout=rows", "train.token_budget=300"],
    "tiny budget": ["train.token_budget=1"],
    "one example": ["train.per_device_train_batch_size=1"],
    "all": ["model.layout=rows", "train.per_device_train_batch_size=4", "train.gradient_checkpointing=true"],
}
LORA = ["peft=lora", "peft.lora_r=4"]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


spawn = _module(HERE.parent / "distributed" / "spawn.py").spawn
made_by = _module(HERE / "curve_cells.py")
STEPS, HALF, REPEATED = made_by.STEPS, made_by.HALF, made_by.REPEATED


def words(objective: str, *more: str, engine: str = "local") -> list[str]:
    """Settings of a cell; IFT's default optimizer would keep its losses too flat to tell anything."""
    optim = ["optim=adamw"] if objective == "ift" else []
    return [f"objective={objective}", f"engine={engine}", *optim, *more]


def cells_of_one_process() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in OBJECTIVE_NAMES:
        found[name] = {"words": words(name)}
        for cut, settings in CUTS.items():
            found[f"{name}, {cut}"] = {"words": words(name, *settings)}
    found |= {f"dpo, {engine}": {"words": words("dpo", engine=engine)} for engine in ENGINES}
    found["dpo, two examples"] = {"words": words("dpo", "train.per_device_train_batch_size=2")}
    found["dpo, lora"] = {"words": words("dpo", *LORA)}
    found["dpo, twice"] = {"words": words("dpo")}
    for seen in ("true", "false"):
        found[f"merged {seen}"] = {"words": words("dpo", f"data.merge_prompts={seen}"), "rows": REPEATED}
    found["merged true, packed"] = {
        "words": words("dpo", "data.merge_prompts=true", "model.layout=packed"), "rows": REPEATED,
    }  # fmt: skip
    for name in ("dpo", "kto"):
        found |= broken_and_resumed(name, words(name))
    return found


def broken_and_resumed(name: str, settings: list[str]) -> dict[str, dict[str, Any]]:
    """A run that is stopped in the middle, and one that goes on from its checkpoint (by the cell's name)."""
    return {
        f"{name}, broken": {"words": settings, "stop": HALF},
        f"{name}, resumed": {"words": settings, "goes_on": f"{name}, broken"},
    }


def cells_of_two_ranks(one: Path) -> dict[str, dict[str, Any]]:
    """``one``: the folder of the broken runs of one process."""
    found = {f"{name}, zero2": {"words": words(name, engine="zero2")} for name in FAMILIES}
    found |= {f"dpo, {engine}": {"words": words("dpo", engine=engine)} for engine in ENGINES}
    found |= {f"{name}, zero3": {"words": words(name, engine="zero3")} for name in ("ift", "reward")}
    found["dpo, zero2, budget"] = {"words": words("dpo", "train.token_budget=100", engine="zero2")}
    found["dpo, zero3, checkpointing"] = {"words": words("dpo", "train.gradient_checkpointing=true", engine="zero3")}
    found |= {f"dpo, lora, {engine}": {"words": words("dpo", *LORA, engine=engine)} for engine in ENGINES}
    for engine in ("zero2", "zero3"):
        found |= broken_and_resumed(f"dpo, {engine}", words("dpo", engine=engine))
        found[f"dpo, {engine}, from one process"] = {
            "words": words("dpo", engine=engine), "goes_on": str(one / "dpo, broken"),
        }  # fmt: skip
    return found


class Launch:
    """The cells of one launch: their settings and what they gave on each rank."""

    def __init__(self, ranks: int, folder: Path, cells: dict[str, dict[str, Any]], environment: dict[str, str]) -> None:
        self.folder = folder / f"runs-{ranks}-{len(list(folder.iterdir()))}"
        self.folder.mkdir()
        self.ranks = spawn(
            HERE / "curve_cells.py", "everything", ranks, self.folder, timeout=1500, environment=environment,
            folder=str(self.folder), cells=cells,
        )  # fmt: skip

    def __getitem__(self, name: str) -> dict[str, Any]:
        return dict(self.ranks[0][name])


class World:
    """Model, rows and cache that all launches share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        made_by.make_model(folder / "model")
        made_by.make_repeated_rows(folder / "rows.jsonl")

    def launch(self, ranks: int, cells: dict[str, dict[str, Any]]) -> Launch:
        return Launch(ranks, self.folder, cells, {"ALIGNLAB_CACHE": str(self.folder / "cache")})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("curves"))


@pytest.fixture(scope="session")
def one(world: World) -> Launch:
    return world.launch(1, cells_of_one_process())


@pytest.fixture(scope="session")
def two(world: World, one: Launch) -> Launch:
    return world.launch(2, cells_of_two_ranks(one.folder))


def same_curve(
    found: dict[str, Any], expected: dict[str, Any], *, start: int = 0, tolerance: float = TOLERANCE
) -> None:
    """Every loss, gradient norm and held-out loss from step ``start`` on."""
    for key in ("loss", "grad_norm"):
        assert len(expected[key]) == STEPS
        assert len(found[key]) == STEPS - start
        for step, (a, b) in enumerate(zip(found[key], expected[key][start:], strict=True), start + 1):
            assert a == pytest.approx(b, rel=tolerance), f"{key} at step {step}"
    assert found["held_out"][-1] == pytest.approx(expected["held_out"][-1], rel=tolerance)


@pytest.mark.parametrize("name", OBJECTIVE_NAMES)
def test_the_curve_is_worth_comparing(one: Launch, name: str) -> None:
    """It moves by far more than the tolerance, no two steps agree, and each objective has its own.

    The first of the two warm-up steps (0.1 x 20) has the learning rate 0, so the second may begin from the same place.
    """
    loss = one[name]["loss"]
    assert all(math.isfinite(value) for value in loss)
    assert max(loss) - min(loss) > 100 * TOLERANCE * max(map(abs, loss))
    assert len(set(loss)) >= STEPS - 1
    with pytest.raises(AssertionError):
        same_curve(one[name], one["sft" if name != "sft" else "cpsft"])
    assert len(one[name]["held_out"]) == 2  # before and after


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", OBJECTIVE_NAMES)
def test_cut_and_layout_do_not_matter(one: Launch, name: str, cut: str) -> None:
    base, found = one[name], one[f"{name}, {cut}"]
    assert base["layout"] == "tree"
    assert found["layout"] == (cut if cut in ("packed", "rows") else "tree")
    assert found["checkpointing"] == (cut == "checkpointing")
    assert base["batches"] == 1
    assert (found["batches"] > 1) == (cut == "budget")
    same_curve(found, base)


def test_examples_in_a_micro_batch_do_not_matter(one: Launch) -> None:
    assert one["dpo, two examples"]["batches"] == 3  # 6 pairs, two a time
    same_curve(one["dpo, two examples"], one["dpo"])


def test_merged_prompts_do_not_matter(one: Launch) -> None:
    apart, together = one["merged false"], one["merged true"]
    assert together["tokens"] < 0.9 * apart["tokens"]
    assert one["merged true, packed"]["tokens"] > apart["tokens"]  # a layout without shared prefixes merges nothing
    same_curve(together, apart)
    same_curve(one["merged true, packed"], apart)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_at_one_rank(one: Launch, engine: str) -> None:
    assert one[f"dpo, {engine}"]["engine"] == engine
    same_curve(one[f"dpo, {engine}"], one["dpo"])


def test_the_same_run_twice_is_bit_equal(one: Launch) -> None:
    assert one["dpo, twice"] == one["dpo"]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_resumed_in_the_middle_is_bit_equal(one: Launch, name: str) -> None:
    broken, resumed, whole = one[f"{name}, broken"], one[f"{name}, resumed"], one[name]
    assert len(broken["loss"]) == HALF
    for key in ("loss", "grad_norm"):
        assert broken[key] + resumed[key] == whole[key]
    assert resumed["held_out"] == whole["held_out"][1:]


@pytest.mark.parametrize(
    "name", [*(f"{name}, zero2" for name in FAMILIES), *(f"dpo, {e}" for e in ENGINES), "ift, zero3", "reward, zero3"]
)
def test_two_ranks(one: Launch, two: Launch, name: str) -> None:
    objective, engine = name.split(", ")
    found = two[name]
    assert found["engine"] == engine
    assert found["batches"] % 2 == 0
    same_curve(found, one[objective])


@pytest.mark.parametrize("name", ["dpo, zero2, budget", "dpo, zero3, checkpointing"])
def test_two_ranks_cut(one: Launch, two: Launch, name: str) -> None:
    assert (two[name]["batches"] > 2) == name.endswith("budget")
    assert two[name]["checkpointing"] == name.endswith("checkpointing")
    same_curve(two[name], one["dpo"])


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_at_two_ranks(one: Launch, two: Launch, engine: str) -> None:
    found = two[f"dpo, lora, {engine}"]
    assert found["trained"] == one["dpo, lora"]["trained"] > one["dpo"]["trained"]  # many small matrices
    same_curve(found, one["dpo, lora"])
    with pytest.raises(AssertionError):
        same_curve(found, one["dpo"])


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_ranks_resumed_is_bit_equal(two: Launch, engine: str) -> None:
    broken, resumed, whole = (two[f"dpo, {engine}{part}"] for part in (", broken", ", resumed", ""))
    assert len(broken["loss"]) == HALF
    for key in ("loss", "grad_norm"):
        assert broken[key] + resumed[key] == whole[key]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_ranks_go_on_where_one_process_stopped(one: Launch, two: Launch, engine: str) -> None:
    same_curve(two[f"dpo, {engine}, from one process"], one["dpo"], start=HALF)


# ---------------------------------------------------------------------------------------------------------------
# The whole grid
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_every_objective_in_every_cut(world: World, one: Launch) -> None:
    cells = {
        f"{name}, {cut}": {"words": words(name, *settings)}
        for name in OBJECTIVE_NAMES
        for cut, settings in NIGHTLY_CUTS.items()
    }
    cells |= {f"{name}, {e}": {"words": words(name, engine=e)} for name in OBJECTIVE_NAMES for e in ENGINES}
    cells |= {f"{name}, lora": {"words": words(name, *LORA)} for name in OBJECTIVE_NAMES}
    cells |= {f"{name}, lora, rows": {"words": words(name, *LORA, "model.layout=rows")} for name in OBJECTIVE_NAMES}
    for name in OBJECTIVE_NAMES:
        cells |= broken_and_resumed(name, words(name))
    found = world.launch(1, cells)
    two = world.launch(2, _grid_of_two_ranks(found.folder))
    for name in OBJECTIVE_NAMES:
        for cut in (*NIGHTLY_CUTS, *ENGINES):
            same_curve(found[f"{name}, {cut}"], one[name])
        same_curve(found[f"{name}, lora, rows"], found[f"{name}, lora"])
        assert found[f"{name}, broken"]["loss"] + found[f"{name}, resumed"]["loss"] == one[name]["loss"]
        for engine in ENGINES:
            same_curve(two[f"{name}, {engine}"], one[name])
            same_curve(two[f"{name}, {engine}, lora"], found[f"{name}, lora"])
            same_curve(two[f"{name}, {engine}, cut"], one[name])
            same_curve(two[f"{name}, {engine}, from one process"], one[name], start=HALF)


def _grid_of_two_ranks(one: Path) -> dict[str, dict[str, Any]]:
    cells: dict[str, dict[str, Any]] = {}
    for name in OBJECTIVE_NAMES:
        for engine in ENGINES:
            key, settings = f"{name}, {engine}", words(name, engine=engine)
            cells[key] = {"words": settings}
            cells[f"{key}, lora"] = {"words": [*settings, *LORA]}
            cells[f"{key}, cut"] = {"words": [*settings, *NIGHTLY_CUTS["all"]]}
            cells[f"{key}, from one process"] = {"words": settings, "goes_on": str(one / f"{name}, broken")}
    return cells
