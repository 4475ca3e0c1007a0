"""The named sources of conf/data: each composes, reads rows in its hub data set's own columns, and has a card."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignlab.config import DataConfig
from alignlab.configuration.compose import compose
from alignlab.configuration.groups import conf_folder, options
from alignlab.data.condition import Conditioner
from alignlab.data.examples import to_examples
from alignlab.data.grouping import grouped
from alignlab.data.rows import Row, RowError, read_rows
from alignlab.data.sources import Needs, rows_of, sample_of, sources_of
from alignlab.errors import DataError
from alignlab.types import Sample, Unit

Json = dict[str, Any]
ROOT = Path(__file__).parents[3]
REAL = ROOT.parent / "shared" / "data"
SOURCES = [name for name in options("data") if name not in ("sums", "cpo")]


def configured(name: str, path: Path | str | None = None, *more: str) -> DataConfig:
    local = [] if path is None else [f"data.path={path}"]
    return compose(["model=tiny", "objective=dpo", f"data={name}", *local, *more]).config.data


def samples(data: DataConfig) -> list[Sample]:
    (source,) = sources_of(data, held_out=False)
    return [sample_of(row, source) for row in rows_of(source, data, Needs(Unit.PAIR), held_out=False)]


def pairs(data: DataConfig) -> list[list[tuple[str, str]]]:
    """(chosen, rejected) last answers of each row, as an objective of pairs gets them."""
    found = []
    for sample in samples(data):
        made = to_examples(sample, Unit.PAIR, by=data.rating)
        said = [said_last(made, number) for number in range(len(made.sequences))]
        found.append([(said[pair.chosen], said[pair.rejected]) for pair in made.pairs])
    return found


def said_last(sample: Sample, number: int) -> str:
    completion = sample.sequences[number].completion
    assert isinstance(completion, list)
    return str(completion[-1]["content"])


def prompt(sample: Sample, number: int = 0) -> list[tuple[str, str]]:
    given = sample.sequences[number].prompt
    assert isinstance(given, list)
    return [(turn["role"], turn["content"]) for turn in given]


def write(path: Path, rows: list[Json]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_composes_and_takes_a_local_copy_in_its_format(name: str, tmp_path: Path) -> None:
    hub, local = configured(name), configured(name, write(tmp_path / "copy.jsonl", []))
    assert re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", hub.path or "")
    assert local.path == str(tmp_path / "copy.jsonl")
    assert hub.eval_path is None  # a hub name here would ask for the network even where data.path is a file
    for field in ("format", "split", "eval_split", "group_by", "rating"):
        assert getattr(hub, field) == getattr(local, field)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_a_card(name: str) -> None:
    text = (conf_folder() / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    card = re.search(r"docs/data/\w+\.md", text.splitlines()[0])
    assert card is not None
    said = (ROOT / card[0]).read_text(encoding="utf-8")
    assert (configured(name).path or "").partition(":")[0] in said
    assert f"data={name}" in said
    for word in ("Licence", "Columns", "Size", "Known defects"):
        assert word in said, word


@pytest.mark.parametrize("name", SOURCES)
def test_without_a_network_or_a_copy_one_line_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = configured(name)
    with pytest.raises(DataError) as error:
        samples(data)
    said = str(error.value)
    assert (data.path or "") in said
    assert "alignlab[hub]" in said
    assert "data.path=" in said
    assert "\n" not in said


def test_a_folder_cloned_from_the_hub_has_its_splits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train_sft", "train_gen", "test_sft"):
        row = {"prompt": "q", "prompt_id": "1", "messages": [{"role": "user", "content": split}]}
        write(tmp_path / "data" / f"{split}-00000-of-00001.jsonl", [row])
    found = samples(configured("ultrachat", tmp_path))
    assert [prompt(sample) for sample in found] == [[("user", "train_sft")]]


# ---------------------------------------------------------------------------------------------------------------
# Each in the columns of its hub data set
# ---------------------------------------------------------------------------------------------------------------


def test_ultrachat(tmp_path: Path) -> None:
    turns = [{"content": text, "role": role} for text, role in (("a?", "user"), ("b", "assistant"), ("c?", "user"))]
    row = {"prompt": "a?", "prompt_id": "x", "messages": [*turns, {"content": "d", "role": "assistant"}]}
    (sample,) = samples(configured("ultrachat", write(tmp_path / "rows.jsonl", [row])))
    assert prompt(sample) == [("user", "a?")]
    assert [turn["content"] for turn in sample.sequences[0].completion] == ["b", "c?", "d"]  # type: ignore[union-attr]


def rated(overall: float, **aspects: str) -> Json:
    judged = {name: {"Rating": rating, "Rationale": "..."} for name, rating in aspects.items()}
    names = {"instruction_following": "5", "honesty": "5", "truthfulness": "5", "helpfulness": "5"}
    return {"annotations": {**{n: {"Rating": r, "Rationale": ""} for n, r in names.items()}, **judged},
            "overall_score": overall, "fine-grained_score": 0.0, "critique": "...", "principle": "helpfulness",
            "custom_system_prompt": "Be helpful.", "model": "m"}  # fmt: skip


def feedback(*completions: Json) -> Json:
    made = [{**completion, "response": f"r{i}"} for i, completion in enumerate(completions)]
    return {"source": "evol_instruct", "instruction": "do it", "models": ["m"] * len(made), "completions": made,
            "correct_answers": ["None"], "incorrect_answers": ["None"]}  # fmt: skip


def test_ultrafeedback_goes_by_its_aspects_unless_asked_otherwise(tmp_path: Path) -> None:
    rows = [feedback(rated(4, honesty="1"), rated(8, honesty="N/A", helpfulness="2"), rated(6))]
    path = write(tmp_path / "rows.jsonl", rows)
    # r0: (5+1+5+5)/4 = 4; r1: (5+5+2)/3 = 4, "N/A" is no rating; r2: 5
    assert pairs(configured("ultrafeedback", path)) == [[("r2", "r0"), ("r2", "r1")]]
    overall = configured("ultrafeedback", path, "data.rating=overall")
    assert pairs(overall) == [[("r1", "r0"), ("r1", "r2"), ("r2", "r0")]]
    # r1's honesty is not rated, so it takes no part
    assert pairs(configured("ultrafeedback", path, "data.rating=honesty")) == [[("r2", "r0")]]
    both = configured("ultrafeedback", path, "data.rating=[helpfulness,truthfulness]")
    assert pairs(both) == [[("r0", "r1"), ("r2", "r1")]]


def test_an_overall_score_of_ten_is_believed_where_the_aspects_agree(tmp_path: Path) -> None:
    ones = dict.fromkeys(("instruction_following", "honesty", "truthfulness", "helpfulness"), "1")
    threes = dict.fromkeys(ones, "3")
    rows = [feedback(rated(10, **ones), rated(10, **threes), rated(10), rated(9, **threes))]
    data = configured("ultrafeedback", write(tmp_path / "rows.jsonl", rows), "data.rating=overall")
    (sample,) = samples(data)
    overall = [sequence.scores.get("overall") for sequence in sample.sequences]
    assert overall == [1, None, 10, 9]  # the first is the released bug: a 1 written as 10
    assert pairs(data) == [[("r2", "r0"), ("r2", "r3"), ("r3", "r0")]]


def test_ultrafeedback_binarized(tmp_path: Path) -> None:
    sides = {side: [{"content": "q", "role": "user"}, {"content": side, "role": "assistant"}]
             for side in ("chosen", "rejected")}  # fmt: skip
    row = {"prompt": "q", "prompt_id": "x", **sides, "messages": sides["chosen"], "score_chosen": 8.5,
           "score_rejected": 3.0}  # fmt: skip
    data = configured("ultrafeedback_binarized", write(tmp_path / "rows.jsonl", [row]))
    assert pairs(data) == [[("chosen", "rejected")]]
    (sample,) = samples(data)
    assert prompt(sample) == [("user", "q")]
    assert [sequence.scores for sequence in sample.sequences] == [{"overall": 8.5}, {"overall": 3.0}]


def test_ultrainteract_sft(tmp_path: Path) -> None:
    row = {"task": "Logic", "dataset": "hotpotqa", "instruction": "do", "response": "done", "id": "a_1_1",
           "parent_id": "b"}  # fmt: skip
    (sample,) = samples(configured("ultrainteract_sft", write(tmp_path / "rows.jsonl", [row])))
    assert prompt(sample) == [("user", "do")]
    assert said_last(sample, 0) == "done"


def tree_rows(depth: int, parent: str = "p") -> list[Json]:
    """The pairs of one tree: behind each wrong action w the environment answers, and the next turn follows."""
    rows, trajectory = [], [{"from": "user", "value": f"task {parent}"}]
    for turn in range(1, depth + 1):
        rows.append({"task": "Math_PoT", "dataset": "MATH", "trajectory": list(trajectory), "chosen": f"c{turn}",
                     "rejected": f"w{turn}", "id": f"{parent}_{depth}_{turn}", "parent_id": parent})  # fmt: skip
        trajectory += [{"from": "assistant", "value": f"w{turn}"}, {"from": "user", "value": f"wrong {turn}"}]
    return rows


def test_ultrainteract_pairs_are_absolute(tmp_path: Path) -> None:
    data = configured("ultrainteract_pair", write(tmp_path / "rows.jsonl", tree_rows(2)))
    assert pairs(data) == [[("c1", "w1")], [("c2", "w2")]]
    first, second = samples(data)
    assert [pair.absolute for sample in (first, second) for pair in sample.pairs] == [True, True]
    assert prompt(second) == [("user", "task p"), ("assistant", "w1"), ("user", "wrong 1")]


def test_ultrainteract_trees_are_whole_wherever_their_rows_stand(tmp_path: Path) -> None:
    p, q = tree_rows(2, "p"), tree_rows(1, "q")
    data = configured("ultrainteract_trees", write(tmp_path / "rows.jsonl", [p[0], *q, p[1]]))
    first, second = samples(data)
    assert (first.id, second.id) == ("p", "q")
    assert pairs(data) == [[("c1", "w1"), ("c2", "w2")], [("c1", "w1")]]
    prompts = {tuple(prompt(first, number)) for number in range(4)}
    assert sorted(map(len, prompts)) == [1, 3]
    assert all(pair.absolute for pair in first.pairs)
    assert [s.label for s in first.sequences] == [True, False, True, False]


def test_ultrainteract_actions_of_other_turns_make_pairs_as_the_reward_model_had_them(tmp_path: Path) -> None:
    """papers: N x N crossings without those of one turn, where N x N <= 10, an action at most 3 times, 9 pairs."""
    rows = [row for depth, name in ((1, "one"), (3, "three"), (4, "four")) for row in tree_rows(depth, name)]
    path = write(tmp_path / "rows.jsonl", rows)
    data = configured("ultrainteract_trees", path, "data.format=ultrainteract_augmented")
    one, three, four = pairs(data)
    assert one == [("c1", "w1")]
    crossed = [(f"c{i}", f"w{j}") for i in (1, 2, 3) for j in (1, 2, 3) if i != j]
    assert three == [("c1", "w1"), ("c2", "w2"), ("c3", "w3"), *crossed]  # 3 x 3 - 3 = 6
    assert four == [(f"c{i}", f"w{i}") for i in (1, 2, 3, 4)]  # 4 x 4 = 16 > 10
    sample = samples(data)[1]
    for pair in sample.pairs[3:]:
        assert pair.absolute
        assert prompt(sample, pair.chosen) == prompt(sample, pair.rejected) == [("user", "task three")]
    assert len(sample.sequences) == 6 + 4  # of turns 2 and 3 each action once more, alone


def test_an_action_is_used_three_times_at_most(tmp_path: Path) -> None:
    """Two turns with one correct and four wrong actions each: c1 meets the 4 of turn 2, c2 the 4 of turn 1."""
    base = tree_rows(2)
    rows = [
        {**row, "rejected": f"w{turn}{n}", "id": f"{turn}{n}"} for turn, row in enumerate(base, 1) for n in range(4)
    ]
    data = configured("ultrainteract_trees", write(tmp_path / "r.jsonl", rows), "data.format=ultrainteract_augmented")
    (made,) = pairs(data)
    assert len(made) == 8  # 2 x 8 = 16 crossings are too many: nothing is added
    few = [rows[0], *rows[4:]]  # c1, w10; c2, w20 w21 w22 w23: 2 x 5 = 10 is allowed
    data = configured("ultrainteract_trees", write(tmp_path / "r.jsonl", few), "data.format=ultrainteract_augmented")
    (made,) = pairs(data)
    assert made[5:] == [("c1", "w20"), ("c1", "w21"), ("c1", "w22"), ("c2", "w10")]  # c1 not a fourth time


def test_ultrasafety(tmp_path: Path) -> None:
    """Its ratings are lists of judgements."""
    completions = [{"model": "m", "response": text, "annotations": {"harmlessness": [{"Rating": r, "Rationale": ""}]}}
                   for text, r in (("sure", "0"), ("no", "1"), ("never", "1"))]  # fmt: skip
    row = {"source": "AdvBench", "instruction": "do harm", "completions": completions}
    data = configured("ultrasafety", write(tmp_path / "rows.jsonl", [row]))
    assert pairs(data) == [[("no", "sure"), ("never", "sure")]]
    assert [s.scores for s in samples(data)[0].sequences] == [{"harmlessness": r} for r in (0, 1, 1)]


def test_ultramedical(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "B. So the answer is B."}]
    row = {"id": "MedQA,1", "type": "Exam", "conversations": turns, "answer": "B", "score": "a 7"}
    (sample,) = samples(configured("ultramedical", write(tmp_path / "rows.jsonl", [row])))
    assert prompt(sample) == [("user", "which?")]
    assert said_last(sample, 0) == "B. So the answer is B."


def test_ultramedical_preference(tmp_path: Path) -> None:
    sides = {side: [{"role": "user", "content": "which?"}, {"role": "assistant", "content": side}]
             for side in ("chosen", "rejected")}  # fmt: skip
    row = {"prompt_id": "MedQA,1", "label_type": "easy", "prompt": "which?", **sides, "metadata": {"chosen": {}}}
    data = configured("ultramedical_preference", write(tmp_path / "rows.jsonl", [row]))
    assert pairs(data) == [[("chosen", "rejected")]]
    assert prompt(samples(data)[0]) == [("user", "which?")]


def test_hh_rlhf(tmp_path: Path) -> None:
    begin = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    data = configured(
        "hh_rlhf", write(tmp_path / "rows.jsonl", [{"chosen": f"{begin} yes", "rejected": f"{begin} no"}])
    )
    assert pairs(data) == [[("yes", "no")]]
    assert prompt(samples(data)[0]) == [("user", "a?"), ("assistant", "b"), ("user", "c?")]


def steer(asked: str, said: str, *ratings: int) -> Json:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": asked, "response": said, **dict(zip(names, ratings, strict=True))}


@pytest.mark.parametrize("name", ["helpsteer", "helpsteer2"])
def test_helpsteer_goes_by_helpfulness(name: str, tmp_path: Path) -> None:
    """b is longer and more complex (its mean is higher), a is more helpful."""
    rows = [steer("q", "a", 4, 4, 4, 0, 0), steer("r", "alone", 1, 1, 1, 1, 1), steer("q", "b", 3, 4, 4, 4, 4)]
    data = configured(name, write(tmp_path / "rows.jsonl", rows))
    assert pairs(data) == [[("a", "b")], []]
    assert samples(data)[0].sequences[0].scores == {
        "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 0, "verbosity": 0,
    }  # fmt: skip


def test_helpsteer2_dialogues(tmp_path: Path) -> None:
    asked = "a?\n<extra_id_1>Assistant\nb\n\nb2\n<extra_id_1>User\nc?"
    (sample,) = samples(configured("helpsteer2", write(tmp_path / "r.jsonl", [steer(asked, "d", 1, 1, 1, 1, 1)])))
    assert prompt(sample) == [("user", "a?"), ("assistant", "b\n\nb2"), ("user", "c?")]


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "40 + 2 = <<40+2=42>>42\n#### 1,042"}
    (sample,) = samples(configured("gsm8k", write(tmp_path / "rows.jsonl", [row])))
    assert sample.verify == {"kind": "number", "answer": "1042"}
    assert prompt(sample) == [("user", "How many?")]


@pytest.mark.parametrize(
    ("name", "row", "what"),
    [
        ("helpsteer", steer("q", "a", 1, 1, 1, 1, 1) | {"coherence": None}, "key 'coherence' is missing"),
        ("helpsteer", {"response": "a"}, "key 'prompt' \\(data.group_by\\) is missing; the row has response"),
        ("ultrainteract_trees", {**tree_rows(1)[0], "chosen": 3}, "key 'chosen': must be a string"),
        ("ultrafeedback", {"instruction": "q", "completions": [{"response": 1}]}, r"completions\[0\].response"),
        ("ultrasafety", {"instruction": "q", "completions": [
            {"response": "r", "annotations": {"harmlessness": [{"Rating": "x"}]}}]}, "harmlessness': must be a number"),
    ],
)  # fmt: skip
def test_a_row_of_another_shape_is_named(name: str, row: Json, what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl: line 1: .*{what}"):
        samples(configured(name, write(tmp_path / "rows.jsonl", [row])))


def test_cpo_mixes_two_sources_in_the_released_buckets(tmp_path: Path) -> None:
    """89,932 pairs at most; each source's rows are conditioned on what they are rated in."""
    said = (ROOT / "docs" / "data" / "cpo.md").read_text(encoding="utf-8")
    fours = dict.fromkeys(("instruction_following", "truthfulness"), "4")
    kind, honest = rated(9, helpfulness="5", honesty="3", **fours), rated(5, helpfulness="2", honesty="5", **fours)
    path = write(tmp_path / "feedback.jsonl", [{**feedback(kind, honest), "id": f"f{i}"} for i in range(20)])
    judged = [
        {"response": r, "annotations": {"harmlessness": [{"Rating": n}]}} for r, n in (("sure", "0"), ("no", "1"))
    ]
    safe = write(tmp_path / "safety.jsonl", [{"instruction": "harm", "completions": judged, "id": "s"}])
    sources = f"data.sources=[{{path: {path}, format: ultrafeedback}}, {{path: {safe}}}]"
    hub = compose(["model=tiny", "objective=cpo", "data=cpo"]).config.data
    data = compose(["model=tiny", "objective=cpo", "data=cpo", sources]).config.data
    assert data.condition == hub.condition
    assert all(source.path in said for source in hub.sources)
    assert sum(bucket["max_count"] for bucket in data.condition.buckets) == 89_932
    conditioner = Conditioner(data.condition, "cpo")
    found: dict[str, set[tuple[str, str]]] = {}
    for source in sources_of(data, held_out=False):
        for row in rows_of(source, data, Needs(Unit.PAIR), held_out=False):
            for made in conditioner.rows(sample_of(row, source)):
                written, _ = conditioner.format.parse(prompt(made)[-1][1])
                won = {(said_last(made, pair.chosen), said_last(made, pair.rejected)) for pair in made.pairs}
                found.setdefault(conditioner.format.tokens(written), set()).update(won)
    assert found == {  # r0 is (5, 3), r1 is (2, 5)
        "<Helpfulness: 5> <Honesty: 3>": {("r0", "r1")},
        "<Helpfulness: 2> <Honesty: 5>": {("r1", "r0")},
        "<Helpfulness: 5>": {("r0", "r1")},  # 0 + 3 against -3 + 5
        "<Helpfulness: 2>": {("r1", "r0")},  # -3 + 3 against 0 + 5
        "": {("r0", "r1"), ("no", "sure")},  # 8 against 7; 1 against 0
        "<Harmlessness: 1>": {("no", "sure")},
        "<Harmlessness: 0>": {("sure", "no")},
    }


# ---------------------------------------------------------------------------------------------------------------
# Grouping
# ---------------------------------------------------------------------------------------------------------------


def test_groups_keep_the_order_of_their_first_rows_and_what_was_written(tmp_path: Path) -> None:
    rows = [{"k": key, "n": n} for n, key in enumerate("abacb")]
    path = str(write(tmp_path / "rows.jsonl", rows))
    renamed = read_rows(path, columns={"number": "n"})
    found = list(grouped(renamed, "k"))
    assert [(row.line, [one["number"] for one in row.value["rows"]]) for row in found] == [
        (1, [0, 2]), (2, [1, 4]), (4, [3]),
    ]  # fmt: skip
    assert found[0].originals == (rows[0], rows[2])
    assert next(iter(grouped(read_rows(path), "k"))).originals == (rows[0], rows[2])


def test_rows_without_the_column_go_where_faulty_rows_go() -> None:
    def rows() -> Iterator[Row]:
        for line, value in enumerate(({"k": 1}, {"x": 1}, {"k": None}, {"k": [1]}, {"k": 1.0}), 1):
            yield Row("f", line, value)

    faulty: list[RowError] = []
    found = list(grouped(rows(), "k", faulty.append))
    assert [len(row.value["rows"]) for row in found] == [1, 1, 1]  # 1, [1] and 1.0 are three values
    assert [(error.line, error.reason) for error in faulty] == [(2, "wrong_schema"), (3, "wrong_schema")]
    with pytest.raises(RowError, match=r"f: line 2: key 'k' \(data.group_by\) is missing; the row has x"):
        list(grouped(rows(), "k"))


# ---------------------------------------------------------------------------------------------------------------
# Real rows
# ---------------------------------------------------------------------------------------------------------------


def real(name: str) -> Path:
    path = REAL / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the real rows are not here")
    return path


@pytest.mark.parametrize(
    ("source", "file", "rows", "made"),
    [
        ("ultrachat", "sft/oasst_best_path.train", 69, 0),
        ("ultrafeedback_binarized", "preference/ultrafeedback_binarized.train", 820, 820),
        ("ultrasafety", "safety/xstest_scored.train", 338, None),
        ("ultramedical", "medical/ultramedical_examples.train", 34, 0),
        ("ultrainteract_pair", "trees/mint_pairs.train", 417, 417),
        ("gsm8k", "math/gsm8k.test", 1074, 0),
    ],
)
def test_stand_ins_are_read(source: str, file: str, rows: int, made: int | None) -> None:
    found = samples(configured(source, real(file)))
    assert len(found) == rows
    if made is not None:
        assert sum(len(sample.pairs) for sample in found) == made
    assert all(sample.sequences for sample in found)


def test_real_trees_are_put_together() -> None:
    """One task's pairs share their parent: as many pairs as there are correct and wrong actions to cross."""
    path = real("trees/mint_pairs.train")
    rows = [row.value for row in read_rows(str(path))]
    found = samples(configured("ultrainteract_trees", path))
    assert [sample.id for sample in found] == list(dict.fromkeys(row["parent_id"] for row in rows))
    for sample in found:
        mine = [row for row in rows if row["parent_id"] == sample.id]
        correct, wrong = {row["chosen"] for row in mine}, {row["rejected"] for row in mine}
        both = correct & wrong
        assert len(sample.pairs) == len(correct - both) * len(wrong - both)


def test_real_ratings_in_the_hubs_layout(tmp_path: Path) -> None:
    """HelpSteer's own rows are one answer each; the stand-in has them by prompt."""
    stand_in = [row.value for row in read_rows(str(real("scored/helpsteer.train")))]
    flat = [{"prompt": row["instruction"], "response": one["response"], **one["annotations"]}
            for row in stand_in for one in row["completions"]]  # fmt: skip
    data = configured("helpsteer", write(tmp_path / "rows.jsonl", flat))
    found = samples(data)
    assert len(found) == len(stand_in) == 110
    assert sum(len(sample.sequences) for sample in found) == 393
    for sample in found:
        made = to_examples(sample, Unit.PAIR, by=data.rating)
        helpful = [sequence.scores["helpfulness"] for sequence in sample.sequences]
        assert len(made.pairs) == sum(a > b for a in helpful for b in helpful)


def test_real_dialogues_in_the_hubs_layout(tmp_path: Path) -> None:
    rows = [row.value for row in read_rows(str(real("preference/hh_helpful.test")))]
    names = {"user": "Human", "assistant": "Assistant"}
    flat = [{side: "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in row["prompt"] + row[side])
             for side in ("chosen", "rejected")} for row in rows]  # fmt: skip
    data = configured("hh_rlhf", write(tmp_path / "rows.jsonl", flat))
    expected = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert [made for (made,) in pairs(data)] == expected
