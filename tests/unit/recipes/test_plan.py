"""What a stage is called: the same for the same work, in any recipe, and another for another number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import ConfigError
from alignlab.recipes.plan import Case, Planned, plan
from alignlab.recipes.reading import read
from alignlab.recipes.work import shown

FILE = """
title: x
data: {rows: {file: "{rows}/rows.jsonl", hub: org/rows}}
settings: {data: sums, train.max_steps: 4, data.options: {rows: 8, seed: "{seed}01"}, engine: local}
stages:
  NAME: {train: {objective: sft, model: tiny}}
  dpo: {start: NAME, train: {objective: dpo, objective.beta: 0.5}}
  same: {start: NAME, train: {objective: sft}}
  meter: {on: dpo, evaluate: {eval.limit: 2}}
  count: {needs: [dpo], run: "own.py:count", with: {n: 2, where: "{run.dpo}"}}
"""
Plan = Callable[..., dict[str, Planned]]


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    def make(
        text: str = FILE, name: str = "one", seed: int = 3, changes: Mapping[str, Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> dict[str, Planned]:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "own.py").write_text("def count(folder, models, seed, n, where): return {'n': n}\n")
        (folder / "toy.yaml").write_text(text.replace("NAME", "sft") if "NAME" in text else text)
        return plan(Case(read(folder, "toy"), seed, changes=changes or {}, **more), tmp_path / "home")

    return make


def keys(found: dict[str, Planned]) -> dict[str, str]:
    return {name: one.key for name, one in found.items()}


def test_stages_have_folders_and_their_settings(planned: Plan, tmp_path: Path) -> None:
    found = planned()
    assert found["sft"].folder == tmp_path / "home" / "stages" / f"sft-{found['sft'].key[:12]}"
    assert found["sft"].settings["data.options"] == {"rows": 8, "seed": 301}
    assert found["sft"].settings["seed"] == 3
    assert found["dpo"].filled()["model.name_or_path"] == str(found["sft"].folder / "run" / "model")
    assert found["dpo"].inputs["model.name_or_path"] == "<model sft>"
    assert found["count"].filled()["where"] == str(found["dpo"].folder / "run")
    assert shown(found["meter"]) == f"alignlab evaluate {found['dpo'].run} eval.limit=2 seed=3"
    assert len(set(keys(found).values())) == 5  # an objective without settings of its own is not another one either


def test_equal_stages_are_one_whatever_they_and_their_recipes_are_called(planned: Plan) -> None:
    one, two = planned(), planned(FILE.replace("NAME", "base"), "two")
    assert one["sft"].folder == two["base"].folder
    for name in ("dpo", "same", "meter"):
        assert one[name].folder == two[name].folder
    assert planned()["sft"].key == one["sft"].key


def test_where_and_on_what_a_stage_runs_is_no_part_of_its_name(planned: Plan) -> None:
    assert keys(planned(FILE.replace("engine: local", "engine: zero0"), "two")) == keys(planned())


def test_a_default_that_is_stated_is_no_other_stage(planned: Plan) -> None:
    stated = FILE.replace("engine: local", "engine: local, optim.max_grad_norm: 1.0")
    assert keys(planned(stated, "two")) == keys(planned())


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"sft": {"train.max_steps": 5}}, {"sft", "dpo", "same", "meter", "count"}),
        ({"dpo": {"objective.beta": 0.6}}, {"dpo", "meter", "count"}),
        ({"dpo": {"data.options.rows": 9}}, {"dpo", "meter", "count"}),
        ({"meter": {"eval.limit": 3}}, {"meter"}),
        ({"count": {"n": 3}}, {"count"}),
    ],
)
def test_a_change_reaches_what_comes_after_and_nothing_else(planned: Plan, changes: Any, other: set[str]) -> None:
    before, after = keys(planned()), keys(planned(changes=changes))
    assert {name for name in before if before[name] != after[name]} == other


def test_another_seed_and_another_file_of_the_recipe(planned: Plan, tmp_path: Path) -> None:
    before = keys(planned())
    assert not set(before.values()) & set(keys(planned(seed=4)).values())
    (tmp_path / "one" / "neighbour.py").write_text("x = 1\n")  # the function may import it
    after = keys(planned())
    assert {name for name in before if before[name] != after[name]} == {"count"}


def test_wrong_settings_are_put_in_and_only_what_their_metric_needs_is_done(planned: Plan) -> None:
    text = FILE + (
        "metrics: {loss: {value: dpo.after.eval_loss}}\n"
        "broken: {strong: {stage: dpo, set: {objective.beta: 5.0}, metric: loss}}\n"
    )
    found = planned(text, broken="strong")
    assert list(found) == ["sft", "dpo"]
    assert found["dpo"].settings["objective.beta"] == 5.0
    assert found["sft"].key == planned(text)["sft"].key
    assert found["dpo"].key != planned(text)["dpo"].key
    assert list(planned(text, only=("same",))) == ["sft", "same"]


def test_rows_are_a_folder_or_the_hubs(planned: Plan, tmp_path: Path) -> None:
    text = FILE.replace("objective: sft, model: tiny", 'objective: sft, model: tiny, data: "{data.rows}"')
    assert planned(text)["sft"].settings["data"] == "org/rows"
    with pytest.raises(ConfigError, match=r"toy\.yaml: stages\.sft: data\.rows: no such file: .*/rows\.jsonl"):
        planned(text, rows=tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    first = planned(text, rows=tmp_path)["sft"]
    assert first.settings["data"] == str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"messages": [1]}\n')
    assert planned(text, rows=tmp_path)["sft"].key != first.key  # other contents
    with pytest.raises(ConfigError, match="say rows=FOLDER"):
        planned(text.replace(", hub: org/rows", ""))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("train.max_steps: 4", "train.max_stepz: 4", "stages.sft: unknown key 'train.max_stepz': did you mean"),
        ("objective: dpo, objective.beta: 0.5", "objective: dpp", "stages.dpo: .*unknown objective 'dpp'"),
        ("objective.beta: 0.5", "objective.simpo_gamma: 1.0", "stages.dpo: objective.simpo_gamma: .*nothing reads it"),
    ],
)
def test_wrong_settings_are_said_before_anything_starts(planned: Plan, old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        planned(FILE.replace(old, new))
    assert "toy.yaml: stages." in str(caught.value)
