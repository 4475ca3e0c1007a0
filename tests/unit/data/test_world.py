import json
from itertools import islice

import pytest

from alignlab.data import world
from alignlab.errors import DataError
from alignlab.registry import VERIFIERS


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_smaller_set_is_a_prefix_of_a_larger_one_and_rows_are_json(kind):
    small, large = list(world.rows(kind, 7)), list(world.rows(kind, 20))
    assert small == large[:7]
    assert len({row["id"] for row in large}) == 20
    assert json.loads(json.dumps(large)) == large
    assert list(world.rows(kind, 7, seed=1)) != small


def test_training_and_held_out_prompts_are_disjoint_for_every_seed():
    seen = {split: {world.problem(s, split, i).prompt for s in (0, 1) for i in range(1500)} for split in world.SPLITS}
    assert not seen["train"] & seen["test"]
    # Not for want of another name: what the stories tell differs.
    told = {
        split: {
            (p.start, *[(sign, i != p.missing and n) for i, (sign, _, n) in enumerate(p.operations)])
            for p in (world.problem(0, split, i) for i in range(4000))
        }
        for split in world.SPLITS
    }
    assert not told["train"] & told["test"]
    assert any(False in [n for _, n in story[1:]] for story in told["test"]), "no story with a number missing"


def test_the_right_result_is_what_the_story_says():
    for i in range(300):
        task = world.problem(0, "train", i)
        total = task.start + sum(n if sign == "+" else -n for sign, _, n in task.operations)
        assert task.steps()[-1].result == total
        assert task.answer == (None if task.missing is not None else total)
        assert all(step.result == eval(f"{step.left}{step.sign}{step.right}") for step in task.steps())
        told = task.prompt
        for j, (sign, verb, n) in enumerate(task.operations):
            assert verb in (world.GAIN if sign == "+" else world.LOSS)
            assert f"{verb} {'some' if j == task.missing else n}." in told


def test_known_mistakes():
    task = world.Problem("Tom", "He", "nuts", 42, (("-", "eats", 5), ("+", "buys", 6)))
    assert [s.result for s in task.steps()] == [37, 43]
    assert [s.result for s in task.steps("borrow")] == [43, 49]
    assert [s.result for s in task.steps("carry")] == [37, 33]
    assert [s.result for s in task.steps("operator", 0)] == [47, 53]
    assert [s.result for s in task.steps("dropped", 0)] == [48]
    assert [s.result for s in task.steps("digit", 1, -2)] == [37, 41]
    assert world.write(task, task.steps("borrow"), 3, 2) == "5-2=3, so 42-5=43\n3+6=9, so 43+6=49\nThe answer is 49."


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("phrasing", [1, 2, 3])
def test_what_was_written_is_what_is_measured(level, phrasing):
    for i in range(200):
        task = world.problem(3, "test", i)
        text = world.write(task, task.steps(), level, phrasing)
        right = {"correct": 1.0, "steps": level, "phrasing": phrasing, "honesty": 3.0}
        invented = right | {"correct": 0.0, "honesty": 1.0}
        assert world.measure(task.verify, text) == (right if task.missing is None else invented), text
        refused = world.measure(task.verify, world.write(task, None, level, phrasing))
        assert refused["correct"] == (task.missing is not None)
        assert (refused["steps"], refused["phrasing"]) == (1, phrasing)
        assert refused["honesty"] == (1.0 if task.missing is None else 3.0)


def test_texts_that_nobody_asked_for_are_not_right():
    verify = {"answer": 37, "operations": 2}
    for text in ("", "no idea", "The answer is 38.", "37 or 38", "42-5=37\nThe answer is 73."):
        assert world.measure(verify, text)["correct"] == 0.0, text
    assert world.measure(verify, "42-5=37\n37")["correct"] == 1.0
    assert world.measure(verify, "rubbish")["phrasing"] == 0.0
    assert world.measure({"answer": None, "operations": 2}, "rubbish")["correct"] == 0.0


def test_pairs_are_right_over_wrong():
    for row in world.rows("pairs", 300):
        good, bad = (world.measure(row["verify"], row[side][0]["content"]) for side in ("chosen", "rejected"))
        assert (good["correct"], bad["correct"]) == (1.0, 0.0)


def test_ratings_are_the_measures_and_every_level_occurs():
    seen = {name: set() for name in world.ATTRIBUTES}
    for row in world.rows("scored", 100):
        assert len(row["completions"]) == 4
        for completion in row["completions"]:
            measured = world.measure(row["verify"], completion["response"])
            for name in world.ATTRIBUTES:
                assert int(completion["annotations"][name]["Rating"]) == measured[name]
                seen[name].add(int(measured[name]))
            assert completion["annotations"]["correctness"]["Rating"] == ("3" if measured["correct"] else "1")
    assert seen == {name: set(levels) for name, levels in world.ATTRIBUTES.items()}


def test_trees_expand_the_wrong_action_with_feedback():
    rows = list(world.rows("trees", 400))
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["trajectory"] == second["trajectory"][:1]
        assert second["trajectory"][1]["value"] == first["rejected"]
        assert "again" in second["trajectory"][2]["value"]
        for row in (first, second):
            assert world.measure(row["verify"], row["chosen"])["correct"] == 1.0
            assert world.measure(row["verify"], row["rejected"])["correct"] == 0.0
            assert row["absolute"] is True


def test_demonstrations_have_the_share_of_faults_that_is_stated():
    rows = list(world.rows("demonstrations", 4000))
    texts = [(row["verify"], row["messages"][-1]["content"]) for row in rows]
    unanswerable = [world.measure(v, t)["correct"] for v, t in texts if v["answer"] is None]
    answerable = [world.measure(v, t)["correct"] for v, t in texts if v["answer"] is not None]
    assert len(unanswerable) / len(rows) == pytest.approx(world.UNANSWERABLE, abs=0.03)
    assert 1 - sum(unanswerable) / len(unanswerable) == pytest.approx(world.INVENTED, abs=0.04)
    assert 1 - sum(answerable) / len(answerable) == pytest.approx(world.SLIP, abs=0.02)


def test_unknown_kind_and_split_name_the_nearest():
    with pytest.raises(DataError, match="demonstrations"):
        next(world.rows("demonstration", 1))
    with pytest.raises(DataError, match="test"):
        next(world.rows("pairs", 1, split="tests"))


def test_verifier_is_registered():
    verify = VERIFIERS.get("sums")
    row = next(islice(world.rows("pairs", 1), 1))
    assert verify(row["verify"], row["chosen"][0]["content"])["correct"] == 1.0


def test_what_a_text_says_in_the_end():
    refusal = "I cannot say how many now: a number is missing."
    texts = ["38+5=43\nThe answer is 43.", "Tom has 43 nuts now.", "43", refusal]
    assert [world.final_answer(text) for text in texts] == ["43", "43", "43", "unknown"]
    assert [world.final_answer(text) for text in ("", "38+5=43\nwell")] == [None, None]
    for i, row in enumerate(world.rows("scored", 40, seed=5)):
        task = world.problem(5, "train", i)
        right = "unknown" if task.answer is None else str(task.answer)
        for completion in row["completions"]:
            agrees = world.final_answer(completion["response"]) == right
            assert agrees == bool(world.measure(row["verify"], completion["response"])["correct"])
