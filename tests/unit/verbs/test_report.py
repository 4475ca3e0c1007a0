"""``alignlab report``: flips planted in the built-in world's pairs are found, and the page shows what it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from alignlab.data import world
from alignlab.data.ledger import read_samples
from alignlab.measuring.forensics import area_under_curve, figures, paths
from alignlab.measuring.report import remarks
from alignlab.train.margins import read_margins

Run = Callable[..., Any]
SHARE = 0.1


def flipped_rows(path: Path, count: int, seed: int) -> Path:
    """The world's pairs, a tenth of them labelled the wrong way round (their ids say so)."""
    wrong = set(Random(seed).sample(range(count), round(SHARE * count)))
    with path.open("w") as file:
        for number, row in enumerate(world.rows("pairs", count, seed)):
            if number in wrong:
                row |= {"chosen": row["rejected"], "rejected": row["chosen"], "id": f"{row['id']}-flipped"}
            file.write(json.dumps({key: row[key] for key in ("id", "prompt", "chosen", "rejected")}) + "\n")
    return path


def trained(run: Run, home: Path, count: int, seed: int, epochs: int) -> tuple[Path, float]:
    """(run folder, area under the curve of its suspicion for the planted flips)"""
    rows = flipped_rows(home / f"flips-{count}-{seed}.jsonl", count, seed)
    name = f"flips-{count}-{seed}"
    answer = run(
        "train", "objective=reward", "model=tiny", f"data={rows}", "data.leaks=keep", "engine=local", "launch=inline",
        f"run.name={name}", f"train.num_train_epochs={epochs}", "train.global_batch_size=16", f"seed={seed}",
        "optim.learning_rate=1e-3",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    folder = home / "runs" / name
    found = paths(read_margins(folder / "ledger"))
    assert len(found) == count
    assert np.diff(found.ptr).tolist() == [epochs] * count
    ids = {row["number"]: row["id"] for row in read_samples(folder / "ledger").to_pylist()}
    wrong = np.array([ids[sample].endswith("flipped") for sample in found.sample.tolist()])
    assert wrong.sum() == round(SHARE * count)
    return folder, area_under_curve(figures(found).suspicion, wrong)


def test_a_short_run_finds_most_flips_and_shows_them(run: Run, home: Path) -> None:
    folder, area = trained(run, home, count=320, seed=0, epochs=3)
    assert area > 0.75
    answer = run("report", str(folder), "suspects=7")
    assert answer.code == 0
    assert "pairs    320 seen, 960 visits" in answer.out
    found = run("report", str(folder), "suspects=7", "--json").json
    scores = [suspect["suspicion"] for suspect in found["suspects"]]
    assert len(scores) == 7
    assert scores == sorted(scores, reverse=True)
    first = found["suspects"][0]
    row = [json.loads(line) for line in (home / "flips-320-0.jsonl").read_text().splitlines()][
        int(first["place"].rsplit(":", 1)[1]) - 1
    ]
    assert row["id"] == first["id"]
    whole = {side: first["prompt"] + first[side] for side in ("chosen", "rejected")}
    for side in ("chosen", "rejected"):
        assert row[side][0]["content"] in whole[side]
        assert row["prompt"][0]["content"] in whole[side]
    page = (folder / "report.html").read_text()
    assert page.count('<div class="pair">') == 7
    assert "<svg" in page
    assert first["id"] in page
    assert "<script" not in page


@pytest.mark.nightly
def test_flips_are_found(run: Run, home: Path) -> None:
    """2,000 pairs, a tenth flipped, four epochs: at least 0.9 for each of three seeds."""
    areas = [trained(run, home, count=2000, seed=seed, epochs=4)[1] for seed in (1, 2, 3)]
    print("areas under the curve:", areas)
    assert min(areas) >= 0.9


def test_a_page_escapes_what_rows_hold(run: Run, home: Path) -> None:
    rows = home / "markup.jsonl"
    with rows.open("w") as file:
        for number in range(4):
            row = {"prompt": f"<script>alert({number})</script>", "chosen": "<b>yes</b>", "rejected": "no & never"}
            file.write(json.dumps(row) + "\n")
    words = ["objective=reward", "model=tiny", f"data={rows}", "engine=local", "launch=inline", "run.name=markup"]
    assert run("train", *words, "train.max_steps=2", "train.global_batch_size=2").code == 0
    assert run("report", str(home / "runs" / "markup")).code == 0
    page = (home / "runs" / "markup" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert "no &amp; never" in page


def test_a_run_without_pairs_says_so(run: Run, home: Path) -> None:
    words = ["objective=sft", "model=tiny", "data=sums", "data.options={rows: 8, eval_rows: 2}", "engine=local"]
    assert run("train", *words, "launch=inline", "run.name=plain", "train.max_steps=2").code == 0
    answer = run("report", "runs/plain", "--json")
    assert answer.json["suspects"] == []
    assert "trained on no pairs" in (home / "runs" / "plain" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"), [((), "folder of a run"), (("runs/plain", "suspects=some"), "suspects=some")]
)
def test_a_wrong_question_is_told(run: Run, home: Path, words: tuple[str, ...], said: str) -> None:
    answer = run("report", *words)
    assert answer.code == 2
    assert said in answer.err


def test_a_falling_chosen_likelihood_is_explained() -> None:
    fell = {"logps/chosen": [(1, -100.0), (50, -120.0)], "rewards/accuracies": [(1, 0.5), (50, 0.9)]}
    assert any("likelihood displacement" in text for text in remarks(fell))
    rose = {"logps/chosen": [(1, -100.0), (50, -101.0)]}  # by a hundredth: noise
    assert remarks(rose) == []
