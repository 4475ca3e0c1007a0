"""A scale file as a user writes it: what it means, and the line that answers each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignlab.errors import ConfigError
from alignlab.recipes import shelf
from alignlab.recipes.reading import read

GOOD = """
title: a small one
seconds: 12
memory_gib: null
hardware: 2 CPU cores
data: {pairs: "{rows}/pairs.jsonl"}
settings: {model: tiny, data: sums, train.max_steps: 4}
stages:
  count: {needs: [dpo], run: "own.py:count", with: {n: 2, model: "{model.sft}"}}
  dpo: {start: sft, train: {objective: dpo, data: "{data.pairs}", train.max_steps: 2}}
  sft: {train: {objective: sft}}
  meter: {on: dpo, evaluate: {control: true}}
metrics:
  gain: {say: what DPO gains, value: dpo.after.eval_loss, minus: sft.after.eval_loss, published: "0.5"}
  n: {value: count.n}
broken:
  strong: {stage: dpo, set: {objective.beta: 9}, metric: gain}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "own.py").write_text("def count(folder, models, seed, n, model): return {'n': n}\n")
    (folder / "toy.yaml").write_text(GOOD)
    return folder


def test_what_a_file_means(recipe: Path) -> None:
    scale = read(recipe, "toy")
    assert (scale.recipe, scale.name, scale.seconds, scale.memory_gib) == ("small", "toy", 12, None)
    assert list(scale.stages) == ["sft", "dpo", "count", "meter"]  # each after what it needs
    assert {name: stage.needs for name, stage in scale.stages.items()} == {
        "sft": (), "dpo": ("sft",), "count": ("dpo", "sft"), "meter": ("dpo",),
    }  # fmt: skip
    assert scale.stages["dpo"].settings["train.max_steps"] == 2  # its own over the common ones
    assert scale.stages["sft"].settings["train.max_steps"] == 4
    assert scale.stages["meter"].settings == {"control": True}  # the run has its settings
    assert scale.metrics["gain"].paths == ["dpo.after.eval_loss", "sft.after.eval_loss"]
    assert scale.metrics["n"].say == "n"
    assert scale.broken["strong"].set == {"objective.beta": 9}
    assert scale.needed(["dpo"]) == ["sft", "dpo"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title: a small one", "titel: a small one", "titel: unknown key (did you mean title?)"),
        ("title: a small one", "", "title: is missing"),
        ("seconds: 12", "seconds: soon", "seconds: soon (expected a number above 0"),
        ("start: sft", "start: sftt", "stages.dpo: no such stage: sftt (did you mean sft?)"),
        ("start: sft", "begin: sft", "stages.dpo.begin: unknown key (known: train, needs, start)"),
        ("on: dpo", "on: count", "stages.meter.on: stage count makes no model"),
        ("on: dpo, ", "", "stages.meter: on: is missing, the stage whose run is evaluated (or rm:)"),
        ("needs: [dpo]", "needs: dpo", "stages.count.needs: expected a list of stages"),
        ("sft: {train: {", "Sft: {train: {", "stages.Sft: a stage's name has small letters"),
        ("sft: {train: {objective: sft}}", "sft: {teach: {}}", "stages.sft: needs one of train, evaluate"),
        ("sft: {train: {objective: sft}}", "sft: {train: {}, loop: {}}", "not train and loop"),
        ("sft: {train: {objective: sft}}", "sft: {start: dpo, train: {}}", "stages: need each other in a circle"),
        ("own.py:count", "../own.py:count", "expected a function of a file of this folder"),
        ("own.py:count", "other.py:count", "no such file"),
        ("{data.pairs}", "{data.pears}", "stages.dpo: {data.pears}: data has no pears"),
        ("{model.sft}", "{modle.sft}", "stages.count: {modle.sft}: known are {seed} {rows}"),
        ("{model.sft}", "{model.meter}", "stages.count: {model.meter}: stage meter makes no model"),
        ('pairs: "{rows}/pairs.jsonl"', "pairs: {path: x}", "data.pairs: expected a path or name, or {file: path"),
        ("value: dpo.after", "value: dpi.after", "metrics.gain.value: 'dpi.after.eval_loss': no such stage: dpi"),
        ("value: count.n", "value: count", "metrics.n.value: 'count': which number of stage count?"),
        ("value: count.n", "valeu: count.n", "metrics.n.valeu: unknown key (did you mean value?)"),
        ("stage: dpo, set", "stage: dpoo, set", "broken.strong.stage: no such stage: dpoo (did you mean dpo?)"),
        ("metric: gain", "metric: gian", "broken.strong.metric: no such metric: gian (did you mean gain?)"),
        ("set: {objective.beta: 9}", "set: {}", "broken.strong.set: is missing"),
    ],
)
def test_each_mistake_is_one_clear_line(recipe: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    (recipe / "toy.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read(recipe, "toy")
    (line,) = [line for line in str(caught.value).splitlines() if said in line]
    assert line.startswith(f"{recipe / 'toy.yaml'}: ")


def test_all_mistakes_are_reported_together(recipe: Path) -> None:
    (recipe / "toy.yaml").write_text(GOOD.replace("title", "titel").replace("start: sft", "start: nobody"))
    with pytest.raises(ConfigError) as caught:
        read(recipe, "toy")
    assert sum("titel" in line or "nobody" in line for line in str(caught.value).splitlines()) == 2


def test_included_stages_take_their_own_files_settings(recipe: Path) -> None:
    """So they are the same for everyone; the file that includes them takes the settings over and adds its own."""
    (recipe / "common.yaml").write_text(
        "settings: {data: sums, train.max_steps: 7, data.options.rows: 5}\n"
        "stages: {base: {train: {objective: sft, model: tiny}}, idle: {train: {objective: sft, model: tiny}}}\n"
    )
    (recipe / "toy.yaml").write_text(
        "title: x\ninclude: common.yaml\nsettings: {train.max_steps: 3, data.options: {rows: 9}}\n"
        "stages: {dpo: {start: base, train: {objective: dpo}}}\n"
    )
    scale = read(recipe, "toy")
    assert list(scale.stages) == ["base", "dpo"]  # nobody needs idle
    assert scale.stages["base"].settings["train.max_steps"] == 7
    assert scale.stages["base"].file.name == "common.yaml"
    dpo = scale.stages["dpo"].settings
    assert (dpo["data"], dpo["train.max_steps"]) == ("sums", 3)
    assert list(dpo).index("data.options") > list(dpo).index("data.options.rows")  # the later one wins


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {sft: {train: {}}}\ntitle: x\n", "common.yaml: title: unknown key"),
        ("stages: {dpo: {train: {}}}\n", "stages.dpo: is a stage of common.yaml already"),
        (None, "include: no such file: common.yaml"),
    ],
)
def test_what_cannot_be_included(recipe: Path, text: str | None, said: str) -> None:
    if text is not None:
        (recipe / "common.yaml").write_text(text)
    (recipe / "toy.yaml").write_text(GOOD + "include: common.yaml\n")
    with pytest.raises(ConfigError, match=said):
        read(recipe, "toy")


def test_recipes_are_found_by_name_or_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shelf.find(str(recipe)) == recipe
    monkeypatch.setattr(shelf, "home", lambda: recipe.parent)
    assert shelf.names() == ["small"]
    assert shelf.find("small") == recipe
    with pytest.raises(ConfigError, match="no such recipe: smal \\(did you mean small"):
        shelf.find("smal")
    with pytest.raises(ConfigError, match="so it is no recipe"):
        shelf.find(str(recipe.parent.parent))
    with pytest.raises(ConfigError, match="has no scale 'paper' \\(it has toy\\)"):
        shelf.file_of(recipe, "paper")


def test_every_recipe_of_the_repository_reads() -> None:
    """Of each scale of each recipe: the schema, references between stages, a measure for every wrong setting."""
    for name in shelf.names():
        for scale in shelf.scales(shelf.find(name)):
            made = read(shelf.find(name), scale)
            assert made.stages
            assert made.title
