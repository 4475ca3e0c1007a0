"""``alignlab evaluate RUN best_of=N`` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main

Run = Callable[..., Any]
SHORT = ("prompts=5", "eval.max_new_tokens=8", "resamples=100")


@pytest.fixture(scope="module")
def folders(home: Path, small_model: Path) -> tuple[Path, Path]:
    """A policy and a reward model of one step each."""
    shared = [
        f"model={small_model}", "data=sums", "data.options={rows: 8, eval_rows: 6}", "engine=local", "launch=inline",
        "train.max_steps=1", "train.global_batch_size=4",
    ]  # fmt: skip
    assert main(["train", "objective=sft", *shared, "run.name=policy"]) == 0
    assert main(["train", "objective=reward", *shared, "run.name=judge"]) == 0
    return home / "runs" / "policy", home / "runs" / "judge"


def test_ways_of_choosing(run: Run, folders: tuple[Path, Path]) -> None:
    policy, judge = folders
    words = ["evaluate", str(policy), "best_of=3", f"score=[judge={judge}, size=sums:steps]", *SHORT]
    found = run(*words, "--json").json
    assert set(found["ways"]) == {"greedy", "random", "majority", "best/judge", "best/size", "oracle"}
    assert (found["prompts"], found["n"]) == (5, 3)
    assert found["scorers"]["size"] == "sums:steps"
    written = list((policy / "eval").glob("best_of-*.json"))
    assert len(written) == 1
    pools = json.loads(written[0].read_text())["answers"]
    assert [len(one["texts"]) for one in pools] == [3] * 5
    assert [len(one["scores"]["judge"]) for one in pools] == [3] * 5
    again = run(*words, "--json").json
    assert again["ways"] == found["ways"]  # a seed is a sample
    assert len(list((policy / "eval").glob("best_of-*.json"))) == 1


def test_a_reward_model_gives_a_text_the_reward_that_its_rows_get(run: Run, folders: tuple[Path, Path]) -> None:
    """The pools' rewards against ``evaluate rm=`` on a file of the same texts: prompts, template and pooling agree."""
    policy, judge = folders
    run("evaluate", str(policy), "best_of=4", f"score={judge}", "prompts=4", "eval.max_new_tokens=10", "resamples=100")
    newest = max((policy / "eval").glob("best_of-*.json"), key=lambda path: path.stat().st_mtime_ns)
    rows, margins = [], []
    for one in json.loads(newest.read_text())["answers"]:
        known = {
            text: score for text, score in zip(one["texts"], one["scores"]["judge"], strict=True) if score is not None
        }
        (good, high), (bad, low) = sorted(known.items(), key=lambda item: -item[1])[:2]
        turns = [[{"role": "assistant", "content": text}] for text in (good, bad)]
        rows.append({"prompt": one["prompt"], "chosen": turns[0], "rejected": turns[1]})
        margins.append(high - low)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run("evaluate", f"rm={judge}", "data=pairs.jsonl", "resamples=100", "--json").json
    assert found["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert found["accuracy"]["value"] == 1.0  # chosen by these very scores


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("best_of=1",), "best_of=1: at least 2"),
        (("best_of=2", "temperature=0"), "answers would all be the same"),
        (("best_of=2", "measure=beauty"), "measure=beauty: the verifier measures correct"),
        (("best_of=2", "score=[a=sums, a=number]"), "two scorers are called 'a'"),
        (("best_of=2", "control=true"), "control= and best_of= are several measurements"),
        (("score=sums",), "score= goes with control=true or with best_of=N"),
        (("best_of=2", "objective=cpsft"), "answers under conditions are not re-ranked"),
    ],
)
def test_a_wrong_question_is_told(run: Run, folders: tuple[Path, Path], words: tuple[str, ...], said: str) -> None:
    answer = run("evaluate", str(folders[0]), "prompts=2", "eval.max_new_tokens=1", *words)
    assert answer.code == 2
    assert said in answer.err
