"""``train -m``: every point runs, what is costly is shared, a failed point is recorded and the rest goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]


def results(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def small(settings: list[str]) -> list[str]:
    return [word for word in settings if not word.startswith(("train.max_steps", "optim."))] + ["train.max_steps=2"]


def test_every_combination_shares_index_and_reference(start: Start, home: Path, small: list[str]) -> None:
    words = ["optim.learning_rate=1e-2", "optim.warmup_ratio=0", "run.name=grid"]
    process = start("train", "-m", *small, *words, "seed=0,1", "objective.beta=0.1,0.2")
    out, err = process.communicate(timeout=400)
    assert (process.returncode, err) == (0, "")
    objects = [line for line in out.splitlines() if line.startswith("object ")]
    assert len(objects) == 4
    assert ["computed" in line for line in objects] == [True, False, False, False]
    assert all("cached (0 s)" in line for line in objects[1:])
    kinds = {kind: len(list((home / "cache" / kind).glob("[!.]*"))) for kind in ("index", "reference")}
    assert kinds == {"index": 2, "reference": 2}  # training rows and held-out rows, once each
    folder = home / "sweeps" / "grid"
    rows = results(folder / "results.csv")
    assert [row["overrides"] for row in rows] == [
        f"seed={seed} objective.beta={beta}" for seed in (0, 1) for beta in (0.1, 0.2)
    ]
    assert {(row["status"], row["exit_code"], row["step"]) for row in rows} == {("done", "0", "2")}
    assert len({row["eval_loss"] for row in rows}) == 4  # seed and beta reach the numbers
    assert all((folder / f"{number:03d}" / "model" / "config.json").is_file() for number in range(4))


def test_a_failed_point_is_recorded_and_the_others_finish(start: Start, home: Path, small: list[str]) -> None:
    """One setting that is refused (exit 2), one that is not finite after an update (exit 3), one that works."""
    process = start("train", "-m", *small, "run.name=broken", "optim.warmup_ratio=0",
                    "optim.learning_rate=-1,1e30,1e-3", "--json")  # fmt: skip
    out, err = process.communicate(timeout=400)
    assert process.returncode == 1
    found: dict[str, Any] = json.loads(out)
    assert [(point["status"], point["exit_code"]) for point in found["points"]] == [
        ("failed", 2), ("failed", 3), ("done", 0),
    ]  # fmt: skip
    rows = results(home / "sweeps" / "broken" / "results.csv")
    assert [row["status"] for row in rows] == ["failed", "failed", "done"]
    assert rows[2]["eval_loss"]
    assert "Traceback" not in err
    assert "learning_rate" in err
    assert "not finite" in err
    assert (home / "sweeps" / "broken" / "001" / "nonfinite.json").is_file()
