"""Shadow objectives of a run: a curve of each, and the same numbers that ``evaluate`` gives for the finished model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.data import world

SHADOWS = {
    "sft": ["objective=sft"],
    "dpo": ["objective=dpo", "objective.beta=0.5"],
    "simpo": ["objective=dpo", "objective.loss_type=simpo"],
    "kto": ["objective=kto"],
    "ift": ["objective=ift"],
}
"""Name in ``eval.shadow`` -> what to type for ``evaluate``."""


@pytest.fixture(scope="module")
def probe(home: Path) -> Path:
    """Pairs of other problems than the run trains on or holds out."""
    file = home / "probe.jsonl"
    rows = [{**row, "verify": None} for row in world.rows("pairs", 5, seed=7, split="test")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_shadow_is_a_curve_that_ends_where_evaluate_says(
    run: Callable, settings: list[str], home: Path, probe: Path
) -> None:
    words = [word for word in settings if not word.startswith("objective=")]
    shadows = ["eval.shadow=[sft,dpo,simpo,kto,ift]", "eval.shadow_options={dpo: {beta: 0.5}}"]
    answer = run(
        "train", "objective=sft", *words, *shadows, f"eval.probe_path={probe}", "train.eval_steps=2", "run.name=a"
    )
    assert answer.code == 0, answer.err
    assert "shadow   dpo, simpo on 5 pairs   (5 read = 5 kept + 0 dropped)" in answer.out
    assert "shadow   kto on 10 sequences" in answer.out
    lines = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line for line in lines if "shadow/dpo" in line}
    assert sorted(curve) == [0, 2, 4]
    assert curve[0]["shadow/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert curve[0]["shadow/dpo_margin"] == pytest.approx(0, abs=1e-4)
    assert len({line["shadow/dpo"] for line in curve.values()}) == 3
    assert json.loads(Path("runs/a/result.json").read_text())["after"]["shadow/dpo"] == curve[4]["shadow/dpo"]
    assert json.loads(Path("runs/a/data/manifest.json").read_text())["shadow/dpo+simpo"]["pairs"] == 5
    for name, typed in SHADOWS.items():
        said = run("evaluate", "runs/a", *typed, f"data.eval_path={probe}", "eval.shadow=[]", "eval.shadow_options={}",
                   "eval.probe_path=null", "--json").json["metrics"]  # fmt: skip
        assert curve[4][f"shadow/{name}"] == pytest.approx(said["eval_loss"], rel=1e-5), name
        for statistic, ending in (("margins", "margin"), ("accuracies", "accuracy"), ("chosen", "chosen")):
            if f"eval_rewards/{statistic}" in said:
                assert curve[4][f"shadow/{name}_{ending}"] == pytest.approx(said[f"eval_rewards/{statistic}"], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.shadow=[dppo]"], "eval.shadow: 'dppo' is no objective and no loss type of dpo; known: "),
        (["eval.shadow=[dpo,reward]"], "eval.shadow: 'reward' scores with a scalar head"),
        (["eval.shadow=[cpo]"], "eval.shadow: 'cpo' needs conditioned rows"),
        (["eval.shadow=[dpo,dpo]"], "eval.shadow: [dpo, dpo] names one twice"),
        (["eval.shadow=[sft]", "objective=reward"], "eval.shadow: objective=reward trains a scalar head"),
        (["eval.shadow=[dpo]", "data.eval_path=null"], "no rows to probe: give pairs in eval.probe_path"),
        (["eval.shadow=[dpo]", "eval.probe_path=gone.jsonl"], "eval.probe_path: no such file or folder: gone.jsonl"),
        (["eval.shadow=[dpo]", "eval.shadow_options={dpo: {bta: 1}}"], "no key 'bta' inside (did you mean beta?)"),
        (["eval.shadow=[dpo]", "eval.shadow_options={ipo: {}}"], "eval.shadow does not name 'ipo'"),
        (["eval.shadow=[dpo]", "eval.shadow_options={dpo: 3}"], "eval.shadow_options.dpo: 3 (expected a mapping"),
        (["eval.probe_path=sums"], "eval.probe_path: nothing reads it without eval.shadow=[...]"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_shadow_is_said_in_one_line(
    run: Callable, settings: list[str], words: list[str], said: str
) -> None:
    answer = run("show", *settings, *words)
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert said in line


def test_rows_that_are_no_pairs_are_named_with_the_key(run: Callable, settings: list[str], home: Path) -> None:
    (home / "plain.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    answer = run("train", *settings, "eval.shadow=[sft,simpo]", "eval.probe_path=plain.jsonl", "run.name=b")
    assert answer.code == 2
    assert "eval.shadow=[simpo]: plain.jsonl: line 1" in answer.err
    assert answer.err.rstrip().endswith("name pairs in eval.probe_path")
