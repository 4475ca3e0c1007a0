"""A round under conditions, answered by policies that are known: what is asked, rated, written and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from alignlab.config import ConditionConfig, DataConfig, EvalConfig, RootConfig
from alignlab.data import world
from alignlab.data.condition import Conditioner, preference_value
from alignlab.data.condition_format import ControlFormat
from alignlab.data.formats import to_sample
from alignlab.data.rows import Row
from alignlab.data.sources import Needs
from alignlab.errors import ConfigError
from alignlab.measuring import asking
from alignlab.measuring.asking import Ratings, RoundOptions
from alignlab.measuring.verification import Answer, Prompt, measures_of, prompts_of
from alignlab.types import Unit

CONDITION = ConditionConfig(buckets=[{"condition": {"steps": "any", "phrasing": "any"}, "max_count": 1000}])
CONFIG = RootConfig(
    data=DataConfig(path="sums", options={"rows": 8, "eval_rows": 18}, condition=CONDITION),
    eval=EvalConfig(max_new_tokens=8),
)
NEEDS = Needs(Unit.PAIR, stage="cpo", world_kind="scored")


class Follower:
    """A policy in exactly the style that its condition asks for, with the sums right; it never says what is missing."""

    def __init__(self, config: RootConfig, verb: str) -> None:
        pass

    def answers(self, prompts: list[Prompt], **_: Any) -> Iterator[Answer]:
        for prompt in prompts:
            asked, _ = ControlFormat().parse(prompt.messages[-1]["content"])  # type: ignore[index]
            assert asked == prompt.requested
            _, split, seed, _, index = prompt.id.split("-")
            task = world.problem(int(seed), split, int(index))
            text = world.write(task, task.steps(), int(asked["steps"]), int(asked["phrasing"]))
            yield Answer(prompt, [text], [measures_of(prompt, text)])


class Mumbler(Follower):
    """The same, but where one line a sum is asked for it says nothing that can be read: level 0."""

    def answers(self, prompts: list[Prompt], **_: Any) -> Iterator[Answer]:
        for answer in super().answers(prompts):
            text = "well" if answer.prompt.requested["steps"] == 2 else answer.texts[0]
            yield Answer(answer.prompt, [text], [measures_of(answer.prompt, text)])


def ratings(config: RootConfig = CONFIG, **options: Any) -> Ratings:
    return Ratings(config, RoundOptions(prompts=6, samples=5, held_out=18, **options), NEEDS)


def with_condition(**changes: Any) -> RootConfig:
    return replace(CONFIG, data=replace(CONFIG.data, condition=replace(CONDITION, **changes)))


@pytest.fixture
def follower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "Sampler", Follower)


def test_answers_of_every_level_become_rows_that_cpo_reads(follower: None) -> None:
    asked = ratings()
    made = asked.sampled("policy", 1)
    assert len(made.samples) == 6
    for one in made.samples:
        for dimension in ("steps", "phrasing"):  # five answers, three levels: twice, twice, once
            levels = Counter(condition[dimension] for condition in one["requested"])
            assert sorted(levels.values()) == [1, 2, 2]
        assert all(
            rated["phrasing"] == condition["phrasing"] and rated["steps"] == condition["steps"]
            for rated, condition in zip(one["ratings"], one["requested"], strict=True)
        )
    assert made.account.as_json() == {"prompts": 6, "kept": 6, "dropped": {}, "unscored": 0, "off_level": 0}
    assert (made.measures["control"], made.measures["control/match"]) == (pytest.approx(1.0), 1.0)
    data = asked.data(CONFIG.data)
    assert data.condition.levels == {"steps": [1, 2, 3], "phrasing": [1, 2, 3]}
    conditioner = Conditioner(data.condition, "cpo")
    for row in made.rows:
        assert all("<" not in turn["content"] for turn in row["prompt"])  # the data floor writes the condition
        (sample,) = conditioner.rows(to_sample(Row("rows.jsonl", 1, row)))
        condition = sample.verify["condition"]
        assert set(condition) == {"steps", "phrasing"}
        values = [preference_value(one["ratings"], condition, {}) for one in row["completions"]]
        assert sample.pairs
        assert all(values[pair.chosen] > values[pair.rejected] for pair in sample.pairs)


def test_held_out_prompts_are_asked_for_the_whole_grid(follower: None) -> None:
    """18 prompts, 9 conditions: each asked twice, so that requests are independent of each other."""
    found = ratings().measured("policy", 0)
    tasks = [world.problem(0, "test", index) for index in range(18)]
    assert found["prompts"] == 18
    assert found["control"] == found["control/steps/correlation"] == pytest.approx(1.0)
    assert found["control/match"] == found["control/phrasing/match"] == 1.0
    assert found["correct"] == pytest.approx(sum(task.missing is None for task in tasks) / 18)
    assert found["steps"] == found["phrasing"] == pytest.approx((1 + 2 + 3) / 3)


def test_rounds_ask_the_next_prompts_under_other_conditions(follower: None) -> None:
    first, again, second = (ratings().sampled("policy", number).samples for number in (1, 1, 2))
    assert first == again
    shared = {one["id"]: one["requested"] for one in first}
    # Round 2 takes the two prompts that are left of eight and begins again with round 1's first four.
    assert [one["id"] for one in second[2:]] == [one["id"] for one in first[:4]]
    assert all(one["requested"] != shared[one["id"]] for one in second[2:])


def test_a_split_by_fraction_parts_the_prompts_too(follower: None) -> None:
    data = replace(CONFIG.data, eval_fraction=0.4, options={"rows": 40})
    asked = Ratings(replace(CONFIG, data=data), RoundOptions(prompts=40, samples=2, held_out=40), NEEDS)
    trained = {one["id"] for one in asked.sampled("policy", 1).samples}
    held = {prompt.id for prompt in prompts_of(data, replace(NEEDS, stage=None), held_out=True)}
    assert len(trained) + len(held) == len(trained | held) == 40
    assert asked.measured("policy", 1)["prompts"] == len(held) > 0


def test_what_no_level_fits_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "Sampler", Mumbler)
    made = ratings().sampled("policy", 1)
    mumbled = sum(condition["steps"] == 2 for one in made.samples for condition in one["requested"])
    assert made.account.off_level == mumbled >= 6
    assert all(rated["ratings"]["phrasing"] > 0 for row in made.rows for rated in row["completions"])
    assert made.account.kept == 6
    assert made.measures["control/phrasing/match"] == pytest.approx(1 - mumbled / 30)


def test_the_rows_own_answer_is_rated_beside(follower: None) -> None:
    made = ratings(own_answer=True).sampled("policy", 1)
    assert made.account.own == {"rated": 6}
    assert all(len(one["texts"]) == 6 and one["own"] and one["requested"][-1] == {} for one in made.samples)
    brought = {row["id"]: [one["response"] for one in row["completions"]] for row in world.rows("scored", 8)}
    assert all(one["texts"][-1] in brought[one["id"]] for one in made.samples)
    assert made.measures == ratings().sampled("policy", 1).measures  # of what was sampled


class Reward:
    """A reward model's stand-in: takes no text of two characters, and sees no condition."""

    identity, is_verifier = "reward", False

    def __call__(self, answers: Sequence[Answer]) -> list[list[float | None]]:
        assert all("<" not in turn["content"] for answer in answers for turn in answer.prompt.messages)  # type: ignore[index]
        return [[float(len(text)) if len(text) > 2 else None for text in answer.texts] for answer in answers]


def test_a_reward_is_a_rating_that_conditions_leave_free(follower: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "named_scorers", lambda words, config: {"reward": Reward()})
    config = with_condition(dimensions=["steps", "phrasing", "reward"], weights={"reward": 0.1})
    made = ratings(config, score=["reward=runs/rm"]).sampled("policy", 1)
    bare = sum(
        condition == {"steps": 1.0, "phrasing": 1.0} for one in made.samples for condition in one["requested"]
    )  # answered by two digits, which the stand-in does not take
    assert made.account.unscored == bare > 0
    assert all(
        set(one["ratings"]) == {"steps", "phrasing", "reward"} for row in made.rows for one in row["completions"]
    )
    monkeypatch.setattr(asking, "named_scorers", lambda words, config: {"steps": Reward()})
    with pytest.raises(ConfigError, match="'steps' is asked for by levels, and a reward is no level"):
        ratings(score=["steps=runs/rm"])


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"weights": {"correctness": 2.0}}, "'correctness' has a weight, .* measured is correct, honesty, phrasing"),
        ({"dimensions": ["steps", "phrasing", "tact"]}, "'tact' is to be rated"),
        ({"buckets": []}, "'correctness' is asked for"),  # no bucket: all that the rows are rated in
    ],
)
def test_what_nothing_measures_is_said_before_the_first_round(
    follower: None, condition: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        ratings(with_condition(**condition)).measured("policy", 0)
