"""``alignlab evaluate RUN control=true`` as a user runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignlab.measuring import sampling
from alignlab.measuring.verification import Answer, Prompt, measures_of

Run = Callable[..., Any]
BUCKET = "data.condition.buckets=[{condition: {steps: any, phrasing: any}, max_count: 1000}]"


@pytest.fixture
def controlled(run: Run, home: Path, small_model: Path) -> Path:
    """A short CPSFT run, trained once for the module."""
    folder = home / "runs" / "controlled"
    if not folder.exists():
        answer = run(
            "train", f"model={small_model}", "objective=cpsft", "data=sums", "data.options={rows: 12, eval_rows: 6}",
            BUCKET, "engine=local", "train.max_steps=2", "train.global_batch_size=4", "run.name=controlled",
        )  # fmt: skip
        assert answer.code == 0, answer.err
    return folder


def test_every_prompt_is_answered_under_every_condition(run: Run, home: Path, controlled: Path) -> None:
    words = ["evaluate", str(controlled), "control=true", "prompts=4", "eval.max_new_tokens=4", "resamples=50"]
    answer = run(*words)
    assert answer.code == 0, answer.err
    # The world's levels: steps 1 to 3 and phrasing 1 to 3, as the rows are rated.
    assert "grid     steps [1, 2, 3] x phrasing [1, 2, 3] = 9 conditions; 4 prompts under each" in answer.out
    found = run(*words, "--json").json
    assert len(found["cells"]) == 9
    assert [cell["answers"] for cell in found["cells"]] == [4] * 9
    assert found["no_condition"] is not None
    assert set(found["effect"]) == {"steps", "phrasing"}
    assert set(found["effect"]["steps"]) == {"correct", "honesty", "phrasing", "steps"}
    pictures = list((controlled / "eval").glob("control-*.png"))
    assert len(pictures) == 1
    assert pictures[0].with_suffix(".json").exists()


def answered(model: Any, tokenizer: Any, encoder: Any, prompts: list[Prompt], **_: Any) -> Iterator[Answer]:
    """One text for each row's prompt under any condition; under the fourth condition the first row's is empty."""
    rows = len({prompt.id for prompt in prompts})
    for number, prompt in enumerate(prompts):
        text = "" if number == 3 * rows else f"The answer is {number % rows}."
        yield Answer(prompt, [text], [measures_of(prompt, text)])


def test_a_reward_model_and_a_callable_measure_too(
    run: Run, home: Path, controlled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "words.py").write_text(
        "from alignlab.registry import register_verifier\n\n\n"
        "@register_verifier('length')\n"
        "def length(verify, completion):\n"
        "    return {'characters': float(len(completion))}\n"
    )
    answer = run(
        "train", f"model={controlled}/model", "objective=reward", "data=sums", "data.options={rows: 8}", "engine=local",
        "train.max_steps=1", "train.global_batch_size=4", "run.name=judge",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    monkeypatch.setattr(sampling, "answers", answered)
    words = ["evaluate", str(controlled), "control=true", "prompts=6", "resamples=20", "plugins=[./words.py]"]
    answer = run(*words, "score=[reward=runs/judge, size=length:characters]", "--json")
    assert answer.code == 0, answer.err
    assert "unscored prompts left out: 1 (" in answer.err
    found = answer.json
    assert found["prompts"] == 5
    assert [cell["answers"] for cell in found["cells"]] == [5] * 9
    assert {"reward", "size", "correct"} <= set(found["effect"]["steps"])
    assert found["scorers"]["size"] == "length:characters"
    # The same text under every condition, which the reward model does not see: the same reward.
    rewards = [cell["means"]["reward"] for cell in found["cells"]]
    assert rewards == pytest.approx([rewards[0]] * 9, rel=1e-5)
    assert set(found["match"]) == {"phrasing", "steps"}
    taken = run(*words, "score=[steps=runs/judge]")
    assert taken.code == 2
    assert "'steps' is what the verifier measures already" in taken.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rm=runs/x",), "several measurements; reward models as measures are score=[NAME=MODEL]"),
        (("score=[beauty:length]",), "no verifier is called so"),
        (("front=[speed]",), "not measured: speed; there is correct, honesty, phrasing, steps"),
        (("data.condition.levels={steps: [2], phrasing: [1, 2]}",), "'steps' has 1 level(s)"),
        (("objective=sft",), "knows no conditions"),
        (("prompts=few",), "prompts: few"),
    ],
)
def test_a_wrong_question_is_told(run: Run, controlled: Path, words: tuple[str, ...], said: str) -> None:
    answer = run("evaluate", str(controlled), "control=true", "eval.max_new_tokens=1", "resamples=2", *words)
    assert answer.code == 2
    assert said in answer.err
