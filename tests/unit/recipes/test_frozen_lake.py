"""The frozen lake: what its maps promise, the optimal matrix and the measures by hand, and wrong settings that show."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.configuration import yamlio
from alignlab.errors import ConfigError
from alignlab.models.scorer import select_attention
from alignlab.recipes.bands import bands

pytest.importorskip("gymnasium", reason="the extra frozen_lake is not installed")

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "frozen_lake"
FILES = ("lake", "measure", "policy", "game", "picture")


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    """The recipe's files, which import one another as they do in a stage's own process."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in FILES})
    finally:
        sys.path.remove(str(RECIPE))
        for name in FILES:
            sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------------------------
# The lake
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "best", "other", "ends"),
    [
        ("detour", [0, 1, 2, 3, 7, 11], [0, 4, 8, 12, 13, 14, 15, 11], "G"),
        ("trap", [0, 1, 2, 3, 7, 11], [0, 4, 8, 12, 13], "H"),
    ],
)
def test_a_map_has_one_optimal_and_one_sub_optimal_trajectory(
    recipe: Any, name: str, best: list[int], other: list[int], ends: str
) -> None:
    lake = recipe.lake.Lake(recipe.lake.MAPS[name])
    assert lake.trajectories() == [best, other]
    assert lake.letters[best[-1]] == "G"
    assert lake.letters[other[-1]] == ends
    optimal = lake.optimal()
    assert [optimal[a, b] for a, b in pairwise(best)] == [1.0] * 5  # the best move everywhere, and the only best one
    assert optimal[other[0], other[1]] == 0.0
    assert set(best) | set(other) >= set(np.flatnonzero(lake.acting).tolist())  # no cell that neither of them visits


def test_the_sub_optimal_trajectory_is_wrong_everywhere_in_the_trap_and_early_in_the_detour(recipe: Any) -> None:
    """Detour: from the k-th cell of the long way (7 moves) 7 - k are left; back and over the short way k + 5 are.
    Going on is worse for k = 0, equal for k = 1, better from k = 2."""
    for name, wanted in (("trap", [0, 0, 0, 0]), ("detour", [0, 0.5, 1, 1, 1, 1, 1])):
        lake = recipe.lake.Lake(recipe.lake.MAPS[name])
        optimal, path = lake.optimal(), lake.trajectories()[1]
        assert [optimal[a, b] for a, b in pairwise(path)] == wanted


def test_two_by_two_by_hand(recipe: Any) -> None:
    """S F / F G, discount 0.9: one move from the gift 1, the start 0.9; from the start both ways are as good."""
    lake = recipe.lake.Lake(("SF", "FG"))
    assert lake.values() == pytest.approx([0.9, 1.0, 1.0, 0.0])
    assert lake.optimal().tolist() == [[0, 0.5, 0.5, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert lake.random().tolist() == [[0.5, 0.25, 0.25, 0], [0.25, 0.5, 0, 0.25], [0.25, 0, 0.5, 0.25], [0, 0, 0, 1]]
    barred = recipe.lake.Lake(("SH", "FG"))  # left and up: stay; right: the hole; down: the way
    assert barred.values() == pytest.approx([0.9, 0.0, 1.0, 0.0])
    assert barred.optimal().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert barred.trajectories() == [[0, 2, 3]]


def test_the_readme_shows_the_maps_as_they_are(recipe: Any) -> None:
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    lines = ["   ".join(rows) for rows in zip(recipe.lake.MAPS["detour"], recipe.lake.MAPS["trap"], strict=True)]
    assert "\n".join(f"    {line}" for line in lines) in text


# ---------------------------------------------------------------------------------------------------------------
# The measures
# ---------------------------------------------------------------------------------------------------------------


def test_mean_squared_error_by_hand(recipe: Any) -> None:
    """Rows (0.1, 0, 0), (0.3, 0.3, 0), (0.5, 0, 0): squares 0.01, 0.18, 0.25; of the first two 0.19 / 6."""
    found = np.array([[0.1, 0, 0], [0.3, 0.3, 0], [0.5, 0, 0]])
    rows = np.array([True, True, False])
    assert recipe.measure.mse(found, np.zeros((3, 3)), rows) == pytest.approx(0.19 / 6)
    assert recipe.measure.mse(np.stack([found, 0 * found]), 0 * found, ~rows) == pytest.approx([0.25 / 3, 0])


def test_a_paired_difference_by_hand(recipe: Any) -> None:
    """1, 2, 3: mean 2, s = 1, t = 2 sqrt(3) at 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2); for 99 % t = 9.9248."""
    found = recipe.measure.paired(np.array([2.0, 3.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    assert found["mean"] == pytest.approx(2)
    assert found["high"] - found["mean"] == pytest.approx(9.924843 / 3**0.5, rel=1e-6)
    assert found["p"] == pytest.approx(1 - (12 / 14) ** 0.5)
    assert found["below"] == 0
    assert recipe.measure.paired(np.ones(3), np.ones(3))["p"] == 1


def test_rows_of_the_error(recipe: Any) -> None:
    rows = recipe.measure.rows_of(recipe.lake.Lake(recipe.lake.MAPS["trap"]))
    assert {name: int(chosen.sum()) for name, chosen in rows.items()} == {
        "reachable": 8, "all": 16, "optimal": 5, "sub-optimal": 3,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The game
# ---------------------------------------------------------------------------------------------------------------


def test_the_policy_has_no_memory(recipe: Any) -> None:
    """What comes next depends on the cell alone, to the last bit."""
    model = recipe.policy.new_policy(16, 3)
    alone = torch.from_numpy(recipe.policy.matrix_of(model))
    path = [0, 4, 8, 4, 0, 1, 2]
    select_attention(model, "sdpa")
    on_the_way = model(input_ids=torch.tensor([path])).logits[0].double().softmax(-1)
    torch.testing.assert_close(on_the_way, alone[path], rtol=0, atol=1e-6)


def test_an_unknown_arm_is_refused(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such arm: dop \(known: sft, ift, dpo, orpo"):
        recipe.game.play(tmp_path, {}, 0, map="trap", seeds=2, dop={})


@pytest.fixture(scope="module")
def played(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two nets on the trap, with both settings that are wrong on purpose; the rest as in the toy scale."""
    folder = tmp_path_factory.mktemp("game")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
        broken = yamlio.load(RECIPE / "toy.yaml")["broken"].values()
        wrong: dict[str, Any] = json.loads(
            json.dumps({arm: keys for one in broken for arm, keys in one["set"].items()}).replace(
                "{recipe}", str(RECIPE)
            )
        )
        return folder, recipe.game.play(folder, {}, 0, map="trap", seeds=2, **wrong)


def test_start_and_target_are_fitted(played: tuple[Path, dict[str, Any]]) -> None:
    """Both to a hundredth of a percent: far below every difference between arms."""
    assert played[1]["fit"]["random"] < 1e-4
    assert played[1]["fit"]["optimal"] < 1e-4


def test_sft_learns_the_optimal_trajectory_and_nothing_else(played: tuple[Path, dict[str, Any]]) -> None:
    """A row of the random agent is off by (3/4)^2 + 3 (1/4)^2 = 3/4 where its four actions lead to four cells, over 16
    columns; a cell that no training visits about keeps it."""
    errors = played[1]["sft"]["mse"]
    assert errors["optimal"] < 1e-3
    assert errors["sub-optimal"] == pytest.approx(played[1]["start"]["mse"], rel=0.25)


def test_wrong_settings_fall_outside_their_bands(played: tuple[Path, dict[str, Any]]) -> None:
    """DPO with the trajectories swapped; IFT with its residual tokens one place too early."""
    path = RECIPE / "expected.json"
    if not path.is_file():
        pytest.skip("the toy scale is not calibrated yet")
    expected = bands(json.loads(path.read_text(encoding="utf-8"))["toy"])
    found = played[1]
    assert found["dpo"]["mse"]["reachable"] > expected["trap-dpo"].high
    assert found["ift"]["mse"]["optimal"] > expected["trap-ift-path"].high


def test_the_picture_is_drawn_from_what_was_played(
    recipe: Any, played: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    made = recipe.picture.draw(tmp_path, {"trap": played[0]}, 0)
    assert Path(made["picture"]).read_bytes().startswith(b"\x89PNG")
    assert made["bytes"] < 100_000
