"""``alignlab loop`` as a user runs it: rounds that go on where they stopped, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "loop.md").read_text(encoding="utf-8")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def words(small_model: Path) -> list[str]:
    """Two rounds so small that nothing is learnt; the measure ``honesty`` differs between a model's random texts."""
    return [
        "loop", "objective=dpo", f"model={small_model}", "data=sums", "data.options={rows: 12, eval_rows: 4}",
        "engine=local", "launch=inline", "train.global_batch_size=2", "train.max_steps=1", "rounds=2", "prompts=5",
        "samples=3", "held_out=4", "eval.max_new_tokens=6", "eval.verifier=length", "measure=words",
        "run.name=small", "plugins=[./words.py]",
    ]  # fmt: skip


@pytest.fixture
def plugin(home: Path) -> None:
    (home / "words.py").write_text(
        "from alignlab.registry import register_verifier\n\n\n"
        "@register_verifier('length')\n"
        "def length(verify, completion):\n"
        "    return {'words': float(len(completion))}\n"
    )


@pytest.fixture(scope="module")
def judge(home: Path, small_model: Path) -> str:
    """A reward model of two steps: its opinions are noise, but they are its own."""
    words = [
        "train", "objective=reward", f"model={small_model}", "data=sums", "data.options={rows: 8}", "engine=local",
        "launch=inline", "train.global_batch_size=4", "train.max_steps=2", "optim.learning_rate=1e-2", "run.name=judge",
    ]  # fmt: skip
    assert main(words) == 0
    return "runs/judge"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_and_what_they_leave(run: Run, home: Path, words: list[str], plugin: None) -> None:
    answer = run(*words)
    assert answer.code == 0, answer.err
    folder = Path("loops/small")
    assert (folder / "curve.svg").read_text().startswith("<svg")
    table = json.loads((folder / "loop.json").read_text())["rounds"]
    assert [row["round"] for row in table] == [0, 1, 2]
    for number in (1, 2):
        samples = [
            json.loads(line) for line in (folder / f"round-{number}/samples/samples.jsonl").read_text().splitlines()
        ]
        rows = [json.loads(line) for line in (folder / f"round-{number}/samples/rows.jsonl").read_text().splitlines()]
        assert len(samples) == 5
        assert all(len(one["texts"]) == len(one["scores"]) == 3 for one in samples)
        row = table[number]
        assert row["rows_from"] == len(rows)
        assert row["rows_from"] + sum(row["dropped"].values()) == 5
        assert all(one["score_chosen"] > one["score_rejected"] for one in rows)
        account = json.loads((folder / f"round-{number}/train/run/data/manifest.json").read_text())["train"]
        assert account["read"] == len(rows)
    prompts = [{one["id"] for one in lines(folder / f"round-{n}/samples/samples.jsonl")} for n in (1, 2)]
    assert not prompts[0] & prompts[1]  # the second round takes the next prompts
    stage = json.loads((folder / "round-2/train/stage.json").read_text())["inputs"]
    assert stage["policy_init"] == str(folder / "round-1/train/run/model")
    assert stage["reference"] == stage["policy_init"]
    assert stage["rows"] == [str(folder / "round-2/samples/rows.jsonl")]


def test_the_same_command_goes_on(run: Run, home: Path, words: list[str], plugin: None) -> None:
    folder = home / "loops" / "small"
    if not folder.exists():
        assert run(*words).code == 0
    before = json.loads((folder / "loop.json").read_text())
    for name in ("round-2/evaluate", "round-2/train"):
        shutil.rmtree(folder / name)
    answer = run(*words)
    assert answer.code == 0, answer.err
    assert answer.out.count("done before") == 5  # of 7 stages
    assert json.loads((folder / "loop.json").read_text()) == before  # bit for bit: greedy answers of equal weights


def test_another_number_is_another_loop(run: Run, home: Path, words: list[str], plugin: None) -> None:
    if not (home / "loops" / "small").exists():
        assert run(*words).code == 0
    answer = run(*words, "temperature=0.7")
    assert answer.code == 2
    assert "temperature 1.0 -> 0.7" in answer.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("policy_init=best", "policy_init=best: known are previous, initial"),
        ("samples=1", "samples=1: at least 2"),
        ("temperature=0", "answers would all be the same"),
        ("objective=sft", "objective=sft learns no preferences"),
        ("objective=cpsft", "objective=cpsft learns no preferences; take dpo, kto or cpo"),
        ("objective=cpo", "measure=words: is of one score; for objective=cpo answers are rated in several dimensions"),
        ("score=[words]", "score: is for objective=cpo; objective=dpo has one scorer="),
        ("reference.name_or_path=x", "the loop chooses the reference"),
        ("rounds=many", "rounds: many"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, words: list[str], plugin: None, more: str, said: str) -> None:
    key = more.partition("=")[0]
    answer = run(*(word for word in words if word.partition("=")[0] != key), more)
    assert answer.code == 2
    assert said in answer.err


def test_a_measure_that_nobody_takes(run: Run, words: list[str], plugin: None) -> None:
    answer = run(*words[:-3], "measure=beauty", "run.name=ugly", words[-1])
    assert answer.code == 2
    assert "measures words" in answer.err


def test_a_reward_model_scores_and_the_verifier_is_shown_beside(
    run: Run, words: list[str], plugin: None, judge: str
) -> None:
    changed = [w for w in words if w.partition("=")[0] not in ("run.name", "rounds")]
    answer = run(*changed, "rounds=1", f"scorer={judge}", "own_answer=true", "run.name=judged")
    assert answer.code == 0, answer.err
    folder = Path("loops/judged")
    table = json.loads((folder / "loop.json").read_text())["rounds"]
    assert {"score", "words"} <= set(table[0])  # greedy answers, as the reward model and as the verifier sees them
    assert {"sampled", "sampled_words"} <= set(table[1])
    samples = lines(folder / "round-1/samples/samples.jsonl")
    assert all(len(one["texts"]) == 4 and one["own"] for one in samples)  # three of the policy, one of the row
    assert all(one["texts"][-1] for one in samples)
    assert all(len(one["measures"]) == 4 for one in samples)
    stage = json.loads((folder / "round-1/samples/stage.json").read_text())
    assert stage["inputs"]["scorer"].startswith("model#")  # the contents of its folder
    rows = {row["id"]: row for row in lines(folder / "round-1/samples/rows.jsonl")}
    for one in samples:
        scores = [score for score in one["scores"] if score is not None]
        if len(set(scores)) > 1:
            assert rows[one["id"]]["score_chosen"] == max(scores)
            assert rows[one["id"]]["score_rejected"] == min(scores)
    assert sum(stage["result"]["own"].values()) == stage["result"]["kept"]


def test_a_scorer_that_is_none(run: Run, words: list[str], plugin: None, small_model: Path) -> None:
    answer = run(*words, f"scorer={small_model}")
    assert answer.code == 2
    assert "ForCausalLM" in answer.err
    answer = run(*words, "scorer=beauty")
    assert answer.code == 2
    assert "no verifier is called so (verifier, choice, length, math, number, sums)" in answer.err


def test_the_page_s_round_under_conditions(run: Run, home: Path) -> None:
    told = PAGE.split("Try it")[1]
    blocks = [
        "\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^    .*\n|^\n)+", told, re.M)
    ]
    program, command = [block.strip() for block in blocks if block.strip()][:2]
    (home / "brevity.py").write_text(program + "\n")
    answer = run(*shlex.split(command)[1:])
    assert answer.code == 0, answer.err
    assert "asked for: length [1, 2, 3] = 3 conditions" in answer.out
    folder = Path("loops/by-length")
    samples, rows = (lines(folder / f"round-1/samples/{name}.jsonl") for name in ("samples", "rows"))
    assert all(sorted(one["length"] for one in sample["requested"]) == [1, 2, 3] for sample in samples)
    levels = {sample["id"]: [rated["length"] for rated in sample["ratings"]] for sample in samples}
    told_apart = [name for name, own in levels.items() if len(set(own)) > 1]
    assert [row["id"] for row in rows] == told_apart != []
    account = json.loads((folder / "round-1/train/run/data/manifest.json").read_text())["train"]
    assert account["read"] == len(rows)
    # A row's condition is what one of its answers achieved; what is nearer to it is preferred.
    assert set(account["conditions"]) <= {f"<Length: {level}>" for level in (1, 2, 3)}
    assert account["pairs"] == sum(counts["pairs"] for counts in account["conditions"].values()) > 0
    before, after = json.loads((folder / "loop.json").read_text())["rounds"]
    assert {"control", "control/match", "length"} <= set(before) & set(after)
    assert after["rows_from"] == len(rows)
    assert after["sampled_length"] == pytest.approx(sum(sum(own) for own in levels.values()) / 18)  # 6 prompts x 3
    again = run(*shlex.split(command)[1:])
    assert again.out.count("done before") == 4
