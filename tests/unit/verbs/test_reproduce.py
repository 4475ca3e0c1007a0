"""``alignlab reproduce`` as a user runs it: verdicts, bands, wrong settings, resuming, and one recipe that trains."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.recipes import shelf

Run = Callable[..., Any]
DOCS = Path(__file__).resolve().parents[3] / "docs"

SCALE = """
title: balls that roll
hardware: one core
stages:
  roll: {run: "balls.py:roll", with: {push: 1.0}}
  brake: {needs: [roll], run: "balls.py:brake", with: {grip: 0.5}}
metrics:
  way: {say: "how far a ball rolls", value: roll.way, published: "10 m"}
  saved: {say: "what braking saves", value: roll.way, minus: brake.way}
broken:
  no-grip: {stage: brake, set: {grip: 0.0}, metric: saved}
"""
CODE = """
import json
def roll(folder, models, seed, push):
    with open(folder.parent.parent / "calls.txt", "a") as calls:
        calls.write(f"roll {seed}\\n")
    return {"way": 10 * push + seed / 10}
def brake(folder, models, seed, grip):
    if (folder.parents[1] / "ice").exists():
        raise ValueError("the brake does not hold")
    way = json.loads((models["roll"] / "answer.json").read_text())["way"]
    return {"way": way * (1 - grip)}
"""


@pytest.fixture
def recipe(home: Path) -> Path:
    folder = home / "balls"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(home / "reproductions", ignore_errors=True)
    folder.mkdir()
    (folder / "toy.yaml").write_text(SCALE)
    (folder / "balls.py").write_text(CODE)
    return folder


def verdict(home: Path, seed: str = "seed-0") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "reproductions/toy/balls" / seed / "verdict.json").read_text())
    return found


def test_before_bands_were_measured_nothing_fails(run: Run, home: Path, recipe: Path) -> None:
    answer = run("reproduce", "./balls")
    assert answer.code == 0, answer.err
    assert answer.out.count("no band yet") == 4  # two lines: the band, and whether inside
    assert re.search(r"how far a ball rolls +10 m +no band yet +10 +no band yet", answer.out)
    assert [one["measured"] for one in verdict(home)["metrics"]] == [10.0, 5.0]
    table = (home / "reproductions/toy/balls/seed-0/verdict.md").read_text()
    assert "| what braking saves | - | no band yet | 5 | no band yet |" in table
    again = run("reproduce", "./balls", "--json")
    assert again.json["verdicts"][0]["passed"] is True
    assert again.err.count("done before") == 2
    assert (home / "reproductions/toy/calls.txt").read_text() == "roll 0\n"  # once


def test_bands_from_seeds_and_what_falls_outside(run: Run, home: Path, recipe: Path) -> None:
    """Ways 10.1 to 10.5: mean 10.3, s 0.158114, half 4.60409 x s x sqrt(1.2) = 0.797452: 9.502 to 11.098; what is saved
    is half of each.  Seed 0 gives 10 and 5: inside; a push of 1.2 gives 12 and 6: outside; no grip saves nothing."""
    calibrated = run("reproduce", "./balls", "calibrate=1,2,3,4,5")
    assert calibrated.code == 0, calibrated.err
    entry = json.loads((recipe / "expected.json").read_text())["toy"]
    assert entry["seeds"] == [1, 2, 3, 4, 5]
    assert entry["metrics"]["way"] == {"values": [10.1, 10.2, 10.3, 10.4, 10.5], "mean": 10.3, "band": [9.502, 11.098]}
    assert entry["metrics"]["saved"]["band"] == [4.751, 5.549]
    assert entry["broken"] == {"no-grip": {"metric": "saved", "value": 0.0, "seed": 1}}
    assert {"settings_hash", "templates", "data", "versions", "machine", "seconds", "date", "level"} <= set(entry)
    inside = run("reproduce", "./balls")
    assert inside.code == 0, inside.err
    assert "9.502 to 11.1" in inside.out
    assert "differs" not in inside.out
    changed = run("reproduce", "./balls", "set.roll.push=1.2")
    assert changed.code == 1
    assert "outside  balls way: 12 is not in 9.502 to 11.1" in changed.out
    assert "differs  balls: with {push: 1.0} -> {push: 1.2} (roll)" in changed.out
    assert verdict(home)["passed"] is True  # the changed one stands elsewhere
    wrong = run("reproduce", "./balls", "broken=all")
    assert wrong.code == 0, wrong.err
    assert re.search(r"broken 'no-grip': what braking saves .* 0 +no, as it should", wrong.out)
    (recipe / "balls.py").write_text(CODE.replace("10 * push", "7 * push"))
    other = run("reproduce", "./balls", "seed=2")
    assert other.code == 1
    assert re.search(r"differs  balls: code \{balls.py: .* \(roll, brake\)", other.out)


def test_a_figure_that_a_run_does_not_define_takes_no_other_with_it(run: Run, home: Path, recipe: Path) -> None:
    """A stage says null where nothing could be computed, as the control meter of a measure that never varies."""
    (recipe / "balls.py").write_text(
        CODE.replace('{"way": way * (1 - grip)}', '{"way": None if way == 10.2 else way / 2}')
    )
    answer = run("reproduce", "./balls", "seed=2")
    assert answer.code == 0, answer.err
    assert re.search(r"what braking saves +- +no band yet +not defined +no band yet", answer.out)
    calibrated = run("reproduce", "./balls", "calibrate=1,2,3")
    assert calibrated.code == 0, calibrated.err
    assert "saved                        not judged   mean not defined of 5.05 not defined 5.15" in calibrated.out
    assert "no band  balls saved: not defined in 1 of 3 seeds" in calibrated.out
    assert json.loads((recipe / "expected.json").read_text())["toy"]["metrics"]["saved"]["values"] == [5.05, None, 5.15]
    assert run("reproduce", "./balls", "calibrate=3,4,5").code == 0
    outside = run("reproduce", "./balls", "seed=2")
    assert outside.code == 1
    assert "outside  balls saved: this run does not define it, so it is not in" in outside.out
    assert [one["inside"] for one in verdict(home, "seed-2")["metrics"]] == [True, False]


def test_outside_though_nothing_differs(run: Run, home: Path, recipe: Path) -> None:
    assert run("reproduce", "./balls", "calibrate=1,2,3").code == 0
    answer = run("reproduce", "./balls", "seed=90")  # a way of 19
    assert answer.code == 1
    assert "differs  balls: no setting, rows, template or version from what balls/expected.json recorded" in answer.out


def test_a_wrong_setting_that_is_not_noticed(run: Run, home: Path, recipe: Path) -> None:
    (recipe / "toy.yaml").write_text(SCALE.replace("grip: 0.0", "grip: 0.51"))
    calibrated = run("reproduce", "./balls", "calibrate=1,2,3,4,5")
    assert "warning  balls saved: the band holds the broken setting 'no-grip'" in calibrated.out
    answer = run("reproduce", "./balls", "broken=no-grip")
    assert answer.code == 1
    assert "stays inside saved's band" in answer.out


def test_a_failed_stage_and_the_same_command_again(run: Run, home: Path, recipe: Path) -> None:
    (home / "reproductions/toy").mkdir(parents=True)
    (home / "reproductions/toy/ice").touch()
    answer = run("reproduce", "./balls")
    assert answer.code == 2
    assert "balls.py: brake: ValueError: the brake does not hold" in answer.out
    assert [one["measured"] for one in verdict(home)["metrics"]] == [10.0, None]
    (home / "reproductions/toy/ice").unlink()
    again = run("reproduce", "./balls")
    assert again.code == 0, again.err
    assert "balls/roll   done before" in again.out
    assert [one["measured"] for one in verdict(home)["metrics"]] == [10.0, 5.0]


def test_all_recipes_in_one_table(run: Run, home: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal stages of two recipes are done once; one that has not the scale is left out."""
    shelves = home / "shelf"
    shutil.rmtree(shelves, ignore_errors=True)
    for name in ("one", "two"):
        shutil.copytree(recipe, shelves / name)
    (shelves / "big").mkdir()
    (shelves / "big" / "paper.yaml").write_text(SCALE.replace("balls.py:", "own.py:"))
    (shelves / "big" / "own.py").write_text(CODE)
    monkeypatch.setattr(shelf, "home", lambda: shelves)
    answer = run("reproduce", "all", "output_dir=both")
    assert answer.code == 0, answer.err
    assert (home / "both/toy/calls.txt").read_text() == "roll 0\n"
    table = (home / "both/toy/verdict.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table] == ["| recipe", "| ---", *["| one"] * 2, *["| two"] * 2]
    listed = run("ls", "recipes")
    assert [line.split()[:2] for line in listed.out.splitlines()[::2]] == [
        ["big", "paper"], ["one", "toy"], ["two", "toy"],
    ]  # fmt: skip
    assert "time ?    memory ?  no band yet       one core" in listed.out
    plain = run("ls")  # runs, as ever; and where the recipes are
    assert (plain.out + plain.err).count("alignlab ls recipes") == 1


def test_the_scale_of_the_paper_is_printed_and_not_done(run: Run, home: Path, recipe: Path) -> None:
    (recipe / "paper.yaml").write_text(
        "title: big\nhardware: 8 GPUs\n"
        "settings: {model: tiny, data: sums, launch: sbatch, launch.nnodes: 2, launch.gpus_per_node: 8}\n"
        "stages: {sft: {train: {objective: sft}}, dpo: {start: sft, train: {objective: dpo}}}\n"
    )
    answer = run("reproduce", "./balls", "scale=paper")
    assert answer.code == 0, answer.err
    assert "8 GPUs. Nothing was started" in answer.out
    assert "--nodes=2 --ntasks-per-node=1 --gpus-per-node=8" in answer.out
    commands = [shlex.split(line) for line in answer.out.splitlines() if line.startswith("alignlab train")]
    assert len(commands) == 2
    first, second = (Path(words[2]).read_text() for words in commands)
    assert "objective: sft\n" in first
    model = Path(commands[0][2]).parent / "run" / "model"
    assert f"model.name_or_path: {model}\n" in second  # where the first command leaves it
    assert not model.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which recipe?"),
        (["bals"], "no such recipe: bals"),
        (["./balls", "scale=huge"], "scale=huge: known are toy, small, paper"),
        (["./balls", "scale=small"], "balls: has no scale 'small' (it has toy)"),
        (["./balls", "seeds=1"], "unknown key 'seeds': reproduce takes scale, seed"),
        (["./balls", "seed=x"], "seed: x (expected a whole number)"),
        (["./balls", "workers=0"], "workers=0: at least 1"),
        (["./balls", "rows=/nowhere"], "rows=/nowhere: no such folder"),
        (["./balls", "only=rol"], "no such stage: rol"),
        (["./balls", "set.rol.push=1"], "no such stage: rol"),
        (["./balls", "set.push=1"], "set.push: written set.<stage>.<key>=value"),
        (["./balls", "broken=bent"], "broken=bent: balls has no such wrong setting at this scale (no-grip)"),
        (["./balls", "calibrate=1,1,2"], "at least 3 different seeds"),
        (["./balls", "calibrate=1,2,3", "set.roll.push=2"], "leave set. out"),
    ],
)
def test_what_cannot_be_asked_for(run: Run, recipe: Path, words: list[str], said: str) -> None:
    answer = run("reproduce", *words)
    assert answer.code == 2
    assert said in answer.err
    assert len(answer.err.splitlines()) == 1


def test_the_recipe_of_the_page(start: Callable[..., subprocess.Popen[str]], home: Path) -> None:
    """What docs/recipes.md tells to write and to type, as it stands there, trainings included."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8").split("## Write one")[1]
    for name, block in re.findall(r"`(mine/[a-z.]+)`:\n\n((?:    .*\n|\n)+)", text):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("".join(f"{line[4:]}\n" for line in block.splitlines()))
    (command,) = re.findall(r"^    alignlab (reproduce \./mine.*)$", text, re.MULTILINE)
    process = start(*shlex.split(command))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    found = json.loads((home / "reproductions/toy/mine/seed-0/verdict.json").read_text())
    assert {one["metric"]: one["inside"] for one in found["metrics"]} == {"margin": None, "words": None}
    (record,) = (home / "reproductions/toy/stages").glob("dpo-*/stage.json")
    assert json.loads(record.read_text())["result"]["steps"] == 4
    manifest = json.loads((record.parent / "run" / "data" / "manifest.json").read_text())
    assert len(manifest["train"]["index"]) == len(manifest["held_out"]["index"]) == 64
