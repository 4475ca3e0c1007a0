"""``alignlab diff``: every section on runs made by the command line, and where a planted difference begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignlab.data.ledger_query import Ledger

Run = Callable[..., Any]


@pytest.fixture
def runs(run: Run, home: Path, settings: list[str]) -> None:
    """Runs ``a``, ``again`` (the same but for a speed key) and ``b`` (another beta), trained once for the module."""
    if (home / "runs" / "b").exists():
        return
    for name, more in (("a", []), ("again", ["train.token_budget=200"]), ("b", ["objective.beta=0.3"])):
        assert run("train", *settings, f"run.name={name}", *more).code == 0


@pytest.fixture
def copied(runs: None, home: Path) -> Iterator[Path]:
    """A copy of run ``a`` to change."""
    shutil.copytree(home / "runs" / "a", home / "runs" / "copy")
    yield home / "runs" / "copy"
    shutil.rmtree(home / "runs" / "copy")


def test_what_only_changes_speed_is_shown_and_does_not_count(run: Run, runs: None) -> None:
    answer = run("diff", "runs/a", "runs/again")
    assert (answer.code, answer.err) == (0, "")
    assert "speed    train.token_budget           -   200 (command line)" in answer.out
    assert "samples  the same in all 4 steps that both have" in answer.out
    assert answer.out.rstrip().endswith("result   the same")
    found = run("diff", "runs/a", "runs/again", "--json").json
    assert found["same"]
    assert found["speed"]["train.token_budget"] == {"values": [None, 200], "set_by": ["default", "command line"]}
    assert [found[name] for name in ("numbers", "model", "data", "samples", "figures", "pair")] == [
        {},
        {},
        {},
        None,
        [],
        None,
    ]
    assert found["compared"] > 40  # four steps and two evaluations of more than ten figures


def test_another_setting_and_the_first_step_that_shows_it(run: Run, runs: None) -> None:
    answer = run("diff", "runs/a", "runs/b", "--json")
    assert answer.code == 1
    found = answer.json
    who = ["conf/objective/dpo.yaml", "command line"]
    assert found["numbers"] == {"objective.beta": {"values": [0.1, 0.3], "set_by": who}}
    assert found["data"] == {}
    assert found["samples"] is None  # the same rows in the same order
    # Both start at the reference, where no beta shows in the loss: log 2.  The gradient is proportional to beta.  The
    # warm-up begins at a learning rate of 0, so the loss is log 2 at step 2 too.
    first = next(point for point in found["figures"] if point["name"] == "grad_norm")
    assert first["step"] == 1
    assert first["values"][1] / first["values"][0] == pytest.approx(3, rel=1e-3)
    loss = next(point for point in found["figures"] if point["name"] == "loss")
    assert loss["step"] == 3
    text = run("diff", "runs/a", "runs/b").out
    assert "numbers  objective.beta               0.1 (conf/objective/dpo.yaml)   0.3 (command line)" in text
    assert "grad_norm parts at step 1: " in text


def test_other_rows_part_the_streams_at_a_step_with_its_samples(run: Run, runs: None, settings: list[str]) -> None:
    assert run("train", *settings, "data.options={rows: 12, eval_rows: 4}", "run.name=rows").code == 0
    found = run("diff", "runs/a", "runs/rows", "--json").json
    assert found["numbers"]["data.options.rows"]["values"] == [24, 12]
    assert found["data"]["train.kept"] == [24, 12]
    assert {"train.index", "train.tokens"} <= set(found["data"])
    told = run("ledger", "runs/a", "other=runs/rows", "--json").json
    assert (found["samples"]["step"], found["samples"]["only"]) == (told["first_difference"], told["only"])
    assert f"samples  part at step {told['first_difference']}" in run("diff", "runs/a", "runs/rows").out


def test_the_pair_whose_margin_parts_first_is_named(run: Run, copied: Path) -> None:
    import pyarrow as pa
    from pyarrow import compute, parquet

    (file,) = (copied / "ledger").glob("margins-*.parquet")
    table = parquet.read_table(file)
    third = compute.equal(table["step"], 3).to_pylist().index(True)
    margins = table["margin"].to_pylist()
    margins[third] += 0.01
    margins[-1] += 0.5  # a later one is larger, and not the first
    place = table.column_names.index("margin")
    changed = pa.array(margins, type=pa.float32())
    parquet.write_table(table.set_column(place, table.schema.field("margin"), changed), file)
    sample = Ledger(copied / "ledger").kept["id"][table["sample"][third].as_py()].as_py()
    found = run("diff", "runs/a", "runs/copy", "--json")
    assert found.code == 1
    pair = found.json["pair"]
    assert (pair["step"], pair["sample"]) == (3, sample)
    assert pair["margins"][1] - pair["margins"][0] == pytest.approx(0.01, rel=1e-3)
    assert run("diff", "runs/a", "runs/copy", "tolerance=1").code == 0


def test_versions_and_templates(run: Run, copied: Path) -> None:
    environment = json.loads((copied / "env.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (copied / "env.json").write_text(json.dumps(environment))
    answer = run("diff", "runs/a", "runs/copy")
    assert answer.code == 0  # the figures are the same: other versions alone make no difference
    assert "versions packages.torch" in answer.out
    account = json.loads((copied / "data" / "manifest.json").read_text())
    account["train"]["template"] = "other#0000"
    (copied / "data" / "manifest.json").write_text(json.dumps(account))
    found = run("diff", "runs/a", "runs/copy", "--json")
    assert found.code == 1
    assert found.json["data"]["train.template"][1] == "other#0000"


def test_a_run_that_stopped_early_is_not_the_same(run: Run, copied: Path) -> None:
    status = json.loads((copied / "status.json").read_text())
    (copied / "status.json").write_text(json.dumps({**status, "step": 2}))
    answer = run("diff", "runs/a", "runs/copy")
    assert answer.code == 1
    assert "steps    4   2" in answer.out


def test_means_over_other_intervals_are_not_compared(run: Run, runs: None, settings: list[str]) -> None:
    assert run("train", *settings, "train.logging_steps=2", "run.name=interval").code == 0
    answer = run("diff", "runs/a", "runs/interval")
    assert answer.code == 0, answer.out
    assert "unread   means over a logging interval: train.logging_steps differs" in answer.out


def test_a_key_that_an_older_version_did_not_have_was_at_its_default(run: Run, copied: Path) -> None:
    lines = (copied / "run.yaml").read_text().splitlines(keepends=True)
    (copied / "run.yaml").write_text("".join(line for line in lines if "shadow_options" not in line))
    assert run("diff", "runs/a", "runs/copy").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/a"], "diff: takes two runs, not 1; diff RUN_A RUN_B [tolerance=0.0001]"),
        (["runs/a", "runs/b", "runs/again"], "diff: takes two runs, not 3"),
        (["runs/a", "runs/none"], "diff: no such run: runs/none"),
        (["runs", "runs/a"], "diff: runs is no run: it holds no run.yaml"),
        (["runs/a", "runs/b", "tolerance=much"], "diff: tolerance=much (expected a number, 0 or more)"),
    ],
)
def test_wrong_words_are_trouble(run: Run, runs: None, words: list[str], said: str) -> None:
    answer = run("diff", *words)
    assert answer.code == 2
    assert said in answer.err
    assert len(answer.err.splitlines()) == 1
