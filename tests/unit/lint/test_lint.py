"""What was planted is found where it was planted, and clean rows give no alarm."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from alignlab.config import DataConfig
from alignlab.data.rows import read_rows
from alignlab.data.sources import Needs
from alignlab.data.template import Encoder
from alignlab.errors import ConfigError, DataError, StorageError
from alignlab.lint import clean, near
from alignlab.lint.check import LintConfig, Report, lint
from alignlab.lint.findings import KINDS
from alignlab.lint.length import LengthBias
from alignlab.lint.near import Signatures
from alignlab.lint.report import as_json, lines
from alignlab.models import tiny
from alignlab.types import Unit

Json = dict[str, Any]
REAL = Path(__file__).parents[4] / "shared" / "data"
WORDS = ["river", "stone", "window", "paper", "green", "morning", "seven", "cloud", "engine", "violin", "market",
         "winter", "copper", "garden", "letter", "bridge"]  # fmt: skip


def sentence(rng: Random, length: int = 14) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def pair(asked: str, chosen: str, rejected: str, **more: Any) -> Json:
    return {"prompt": [{"role": "user", "content": asked}], "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}], **more}  # fmt: skip


def sound(rng: Random) -> Json:
    """A pair of random words; half the time the longer answer is preferred."""
    return pair(sentence(rng), sentence(rng, rng.randint(8, 20)), sentence(rng, rng.randint(8, 20)))


def write(path: Path, rows: list[Any]) -> str:
    text = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return str(path)


def found(report: Report) -> dict[str, list[int]]:
    """Lines by finding."""
    made: dict[str, list[int]] = {}
    for entry in report.findings.entries:
        made.setdefault(entry["finding"], []).append(entry.get("line", 0))
    return {kind: sorted(numbers) for kind, numbers in made.items()}


# ---------------------------------------------------------------------------------------------------------------
# Planted, each kind
# ---------------------------------------------------------------------------------------------------------------

QUESTION = "how many green windows does the old copper engine of the winter market have in all"


def planted(seed: int) -> tuple[list[Any], list[Json], list[Json], dict[str, list[int]]]:
    """(training rows, held-out rows, benchmark rows, lines by finding), in an order by ``seed``."""
    rng = Random(seed)
    good = [sound(rng) for _ in range(300)]
    tagged: list[tuple[str, Any]] = [("", row) for row in good]
    text = [sentence(rng, 30) for _ in range(40)]
    tagged += [("identical_pair", pair(text[0], text[1], text[1]))]
    tagged += [("empty_response", pair(text[2], "\u200b\n", text[3])), ("empty_response", pair(text[4], text[5], ""))]
    tagged += [("malformed", '{"prompt": [,'), ("malformed", {"prompt": "q", "chosen": 3, "rejected": "r"})]
    tagged += [("malformed", '{"prompt": "a \\ud83d b", "chosen": "c", "rejected": "d"}')]  # half of a smiling face
    held = [sound(rng) for _ in range(50)]
    tagged += [("leak", held[7])]
    asked = held[9]["prompt"][0]["content"]
    tagged += [("shared_prompt", pair(f" {asked}\n", text[6], text[7]))]
    tagged += [("benchmark", pair(f"Tell me: {QUESTION.upper()}?", text[8], text[9]))]
    tagged += [("benchmark", pair(text[10], f"As they ask: '{QUESTION[9:]}'.", text[11]))]
    odd = {"mojibake": "caf\u00c3\u00a9 and it\u00e2\u20ac\u2122s", "replacement_character": "a \ufffd b",
           "control_character": "bell \x07", "zero_width": "a\u200bb", "direction_mark": "\u202eabc"}  # fmt: skip
    tagged += [
        (kind, pair(text[12 + i], said + text[20 + i], text[26 + i])) for i, (kind, said) in enumerate(odd.items())
    ]
    tagged += [("score_tie", pair(text[17], text[18], text[19], score_chosen=3.0, score_rejected=3.0))]
    tagged += [("score_order", pair(text[31], text[32], text[33], score_chosen=2.0, score_rejected=3.0))]
    scored = [{"response": said, "scores": {"x": 1}} for said in (text[34], text[35])]
    tagged += [("no_example", {"instruction": text[36], "completions": scored})]
    repeated = [{"response": said, "scores": {"x": s}} for said, s in ((text[37], 2), (text[38], 1), (text[38], 1))]
    tagged += [("repeated_answer", {"instruction": text[39], "completions": repeated})]
    rng.shuffle(tagged)
    # What stands twice is an error of the later row: behind all others.
    first = next(row for tag, row in tagged if not tag)
    tagged += [("duplicate", {**first, "id": "copy"})]
    one, two = [row for tag, row in tagged if not tag][1:3]
    flipped = {**one, "chosen": one["rejected"], "rejected": one["chosen"]}
    tagged += [("conflict", flipped)]
    close = json.loads(json.dumps(two).replace("river", "River,"))
    close["chosen"][0]["content"] += "!"
    close["rejected"][0]["content"] = close["rejected"][0]["content"].rpartition(" ")[0]
    tagged += [("near_duplicate", close)]
    places: dict[str, list[int]] = {}
    for line, (tag, _) in enumerate(tagged, 1):
        if tag:
            places.setdefault(tag, []).append(line)
    places["conflict"].append(next(line for line, (_, row) in enumerate(tagged, 1) if row is one))
    places["zero_width"] += [next(n for n, (_, row) in enumerate(tagged, 1) if "\\u200b\\n" in json.dumps(row))]
    return [row for _, row in tagged], held, [pair(QUESTION, "x", "y"), {"prompt": "too short"}], places


@pytest.mark.parametrize("seed", [0, 1])
def test_every_planted_defect_is_found_and_nothing_else(seed: int, tmp_path: Path) -> None:
    rows, held, questions, places = planted(seed)
    data = DataConfig(path=write(tmp_path / "train.jsonl", rows), eval_path=write(tmp_path / "held.jsonl", held))
    benchmark = [write(tmp_path / "benchmark.jsonl", [row]) for row in questions[:1]]
    benchmark += [write(tmp_path / "short.jsonl", questions[1:])]
    report = lint(data, LintConfig(benchmark=benchmark))
    assert found(report) == {kind: sorted(lines) for kind, lines in places.items()}
    assert report.rows == len(rows)
    assert report.held_out == {data.eval_path: len(held)}
    assert (report.benchmark_questions, report.benchmark_short) == (2, 1)
    others = {entry["finding"]: entry["other"] for entry in report.findings.entries if "other" in entry}
    assert others["leak"] == {"file": data.eval_path, "line": 8}
    assert others["shared_prompt"] == {"file": data.eval_path, "line": 10}
    assert others["benchmark"] == {"file": benchmark[0], "line": 1}
    table = "\n".join(lines(report))
    told = as_json(report)
    for kind, where in places.items():
        assert kind in table
        assert told["findings"][kind] == {"class": "error" if KINDS[kind].error else "warning", "count": len(where)}


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_clean_rows_give_no_alarm(seed: int, tmp_path: Path) -> None:
    rng = Random(seed)
    rows, held, questions = ([sound(rng) for _ in range(n)] for n in (400, 100, 50))
    rows += [
        pair("Wie heißt du? 你好 — “naïve” café, فارسی می‌خواهم 👩‍👩‍👧", "CAFÉ»  «À» Ärger Ñandú", "Ça va? Âge · Ã")
    ]
    data = DataConfig(path=write(tmp_path / "t.jsonl", rows), eval_path=write(tmp_path / "h.jsonl", held))
    report = lint(data, LintConfig(benchmark=[write(tmp_path / "b.jsonl", questions)]))
    assert report.findings.entries == []
    assert report.length.rows > 300


def test_what_the_template_does_is_looked_at_with_an_encoder(tmp_path: Path) -> None:
    rng = Random(5)
    rows = [sound(rng) for _ in range(6)] + [pair("long " * 200, "x", "y")]
    data = DataConfig(path=write(tmp_path / "t.jsonl", rows))
    needs = Needs(Unit.PAIR)
    tokenizer = tiny.tokenizer()
    assert found(lint(data, LintConfig(), Encoder(tokenizer, max_length=600), needs)) == {"overlong": [7]}
    stopless = tiny.CHAT_TEMPLATE.replace("{{- '<|im_end|>\n' }}{% endfor %}", "{{- '\n' }}{% endfor %}")
    assert stopless != tiny.CHAT_TEMPLATE
    report = lint(data, LintConfig(), Encoder(tokenizer, chat_template=stopless, max_length=600), needs)
    assert found(report) == {"no_terminator": [1, 2, 3, 4, 5, 6], "overlong": [7]}
    demonstrations = write(tmp_path / "d.jsonl", [{"messages": rows[0]["prompt"] + rows[0]["chosen"]}])
    wrong = lint(DataConfig(path=demonstrations), LintConfig(), Encoder(tokenizer), needs)
    assert found(wrong) == {"malformed": [1]}
    assert "needs pairs" in wrong.findings.entries[0]["detail"]


def test_a_row_goes_as_a_duplicate_only_if_all_of_it_stood_before(tmp_path: Path) -> None:
    def rated(asked: str, **ratings: int) -> Json:
        return {"instruction": asked, "completions": [{"response": r, "scores": {"x": s}} for r, s in ratings.items()]}

    rows = [rated("q", aaaa=3, bbbb=2), rated("q", aaaa=3, bbbb=2, cccc=1), rated("q", aaaa=5, bbbb=4)]
    report = lint(DataConfig(path=write(tmp_path / "t.jsonl", rows)), LintConfig(similarity=0))
    assert found(report) == {"duplicate": [3]}
    assert report.examples == 1 + 3 + 1


def test_every_row_with_a_held_out_prompt_is_named(tmp_path: Path) -> None:
    rows = [pair("the shared question", f"answer {i}", f"other {i}") for i in range(3)]
    train, held = write(tmp_path / "t.jsonl", rows), write(tmp_path / "h.jsonl", [{"prompt": "the shared question"}])
    report = lint(DataConfig(path=train), LintConfig(against=[held], similarity=0))
    assert found(report) == {"shared_prompt": [1, 2, 3]}
    assert report.held_out == {held: 1}


def test_near_copies_of_held_out_rows_are_named(tmp_path: Path) -> None:
    rng = Random(6)
    rows, held = [sound(rng) for _ in range(20)], [sound(rng) for _ in range(20)]
    close = json.loads(json.dumps(held[3]))
    close["prompt"][0]["content"] += " now"
    data = DataConfig(path=write(tmp_path / "t.jsonl", [*rows, close]), eval_path=write(tmp_path / "h.jsonl", held))
    report = lint(data, LintConfig())
    assert found(report) == {"near_leak": [21]}
    assert report.findings.entries[0]["other"] == {"file": data.eval_path, "line": 4}


def test_length_bias_is_reported_from_a_clear_majority_on(tmp_path: Path) -> None:
    def biased(share: float) -> Report:
        rng = Random(7)
        rows = []
        for i in range(200):
            short, long = sentence(rng, 8), sentence(rng, 16)
            rows.append(pair(sentence(rng), *((long, short) if i < 200 * share else (short, long))))
        return lint(DataConfig(path=write(tmp_path / f"{share}.jsonl", rows)), LintConfig())

    assert found(biased(0.5)) == {}
    assert found(biased(0.62)) == {}  # its interval reaches below 0.6
    assert found(biased(0.8)) == {"length_bias": [0]}
    assert found(biased(0.2)) == {"length_bias": [0]}
    assert biased(0.8).length.accuracy == pytest.approx(0.8)


def test_a_rows_pairs_weigh_one_row() -> None:
    bias = LengthBias()
    bias.add([(5, 3), (5, 4), (3, 4), (2, 2)])  # two of three
    bias.add([(1, 9)])
    bias.add([(4, 4)])
    assert (bias.pairs, bias.equal, bias.rows) == (4, 2, 2)
    assert bias.accuracy == pytest.approx((2 / 3 + 0) / 2)
    assert LengthBias().interval == (0.0, 1.0)
    assert LengthBias().accuracy is None


# ---------------------------------------------------------------------------------------------------------------
# Near duplicates against a naive twin
# ---------------------------------------------------------------------------------------------------------------


def jaccard(a: str, b: str) -> float:
    one, two = ({text[i : i + near.SHINGLE] for i in range(len(text) - near.SHINGLE + 1)} for text in (a, b))
    return len(one & two) / len(one | two)


def test_signatures_find_what_all_comparisons_find() -> None:
    """150 texts, 50 of them edited copies; all 11,175 pairs compared.  A signature's estimate has a standard deviation
    of at most sqrt(0.25 / 128) = 0.044, so that a pair 0.15 above or below the threshold is told apart."""
    rng = Random(8)
    texts = [sentence(rng, 20) for _ in range(100)]
    for number in range(50):
        words = texts[number].split()
        for _ in range(number % 5):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words))
    signatures = Signatures()
    for text in texts:
        signatures.add(text)
    threshold = 0.7
    pairs = signatures.pairs(threshold)
    for number, other, similarity in pairs:
        assert other < number
        assert jaccard(texts[number], texts[other]) > threshold - 0.15
        assert abs(similarity - jaccard(texts[number], texts[other])) < 0.15
    surely = {j for i, j in itertools.combinations(range(150), 2) if jaccard(texts[i], texts[j]) > threshold + 0.15}
    assert surely
    assert surely <= {pair.number for pair in pairs}


def test_case_space_and_punctuation_make_no_other_text() -> None:
    signatures = Signatures()
    for text in ("Hello, world: again!", "hello  world again", "", "a"):
        signatures.add(text)
    assert [(pair.number, pair.other) for pair in signatures.pairs(0.99)] == [(1, 0)]


def test_without_the_library_the_rest_is_looked_at_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    rng = Random(9)
    row = sound(rng)
    report = lint(DataConfig(path=write(tmp_path / "t.jsonl", [row, row])), LintConfig())
    assert found(report) == {"duplicate": [2]}
    said = [line for line in lines(report) if "alignlab[lint]" in line]
    assert said == ["skipped  near duplicates: `pip install alignlab[lint]`"]


def test_texts_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 rows of 5 kB: what the lint holds at any time stays far below what was read (the languages' model aside)."""
    monkeypatch.setattr("alignlab.lint.languages.available", lambda: False)
    rng = Random(10)
    long = [" ".join(rng.choices(WORDS, k=400)) for _ in range(40)]
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(500):
            file.write(json.dumps(pair(f"{i} {sentence(rng)}", *rng.sample(long, 2))) + "\n")
    size = path.stat().st_size
    assert size > 2e6
    tracemalloc.start()
    report = lint(DataConfig(path=str(path)), LintConfig(similarity=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.rows == 500
    assert peak < size / 4


# ---------------------------------------------------------------------------------------------------------------
# The cleaned file
# ---------------------------------------------------------------------------------------------------------------


def test_rows_are_written_as_they_stand_and_counted(tmp_path: Path) -> None:
    rows, held, questions, places = planted(0)
    data = DataConfig(path=write(tmp_path / "t.jsonl", rows), eval_path=write(tmp_path / "h.jsonl", held))
    config = LintConfig(benchmark=[write(tmp_path / "b.jsonl", questions[:1])])
    report = lint(data, config)
    leaving = report.findings.leaving(drop=["near_duplicate"])
    target = tmp_path / "cleaned.jsonl"
    kept, left_out = clean.write(target, data, leaving, report.rows)
    expected = {n for kind, where in places.items() if KINDS[kind].leaves or kind == "near_duplicate" for n in where}
    assert (kept, left_out) == (len(rows) - len(expected), len(expected))
    stay = [row for number, row in enumerate(rows, 1) if number not in expected]
    assert [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]] == stay
    out = [json.loads(line) for line in clean.second_file(target).read_text(encoding="utf-8").split("\n")[:-1]]
    assert {one["line"] for one in out} == expected
    assert all(one["reasons"] for one in out)
    readable = {number for number in expected if isinstance(rows[number - 1], dict)}
    assert {one["line"]: one["row"] for one in out if "row" in one} == {n: rows[n - 1] for n in readable}
    again = lint(DataConfig(path=str(target), eval_path=data.eval_path), config)
    assert not [kind for kind in found(again) if KINDS[kind].error]


def test_renamed_and_grouped_rows_are_written_as_in_the_file(tmp_path: Path) -> None:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    rows = [{"asked": q, "response": r, **dict.fromkeys(names, s)}
            for q, r, s in (("q", "one", 3), ("p", "x", 1), ("q", "two", 1), ("p", "x", 2))]  # fmt: skip
    data = DataConfig(path=write(tmp_path / "t.jsonl", rows), columns={"prompt": "asked"}, group_by="prompt",
                      format="helpsteer")  # fmt: skip
    report = lint(data, LintConfig())
    assert found(report) == {"identical_pair": [2], "repeated_answer": [2]}
    target = tmp_path / "c.jsonl"
    assert clean.write(target, data, report.findings.leaving(), report.rows) == (1, 1)
    assert [json.loads(line) for line in target.read_text().splitlines()] == [rows[0], rows[2]]
    (out,) = [json.loads(line) for line in clean.second_file(target).read_text().splitlines()]
    assert out["row"] == [rows[1], rows[3]]


def test_nothing_is_written_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(11)
    path = tmp_path / "t.jsonl"
    data = DataConfig(path=write(path, [sound(rng) for _ in range(5)]))
    target = tmp_path / "out" / "c.jsonl"
    target.parent.mkdir()
    with pytest.raises(StorageError, match=r"changed while it was read \(6 rows, then 5\)"):
        clean.write(target, data, {}, 6)
    assert list(target.parent.iterdir()) == []

    def full(file: Any, value: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(clean, "_line", full)
        with pytest.raises(StorageError, match="No space left on device"):
            clean.write(target, data, {}, 5)
    assert list(target.parent.iterdir()) == []
    assert clean.write(target, data, {}, 5) == (5, 0)


def test_line_ends_of_other_readers_stay_inside_their_row(tmp_path: Path) -> None:
    row = pair("a\u2028b", "c\x85d", "e\u2029f")
    data = DataConfig(path=write(tmp_path / "t.jsonl", [row]))
    clean.write(tmp_path / "c.jsonl", data, {}, 1)
    text = (tmp_path / "c.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1
    assert json.loads(text) == row


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl: holds no row"):
        lint(DataConfig(path=write(tmp_path / "t.jsonl", [])), LintConfig())
    data = DataConfig(path=write(tmp_path / "one.jsonl", [pair("a", "b", "c")]))
    with pytest.raises(ConfigError, match="unknown finding 'duplicat'; did you mean duplicate"):
        lint(data, LintConfig(drop=["duplicat"]))
    with pytest.raises(ConfigError, match="similarity"):
        lint(data, LintConfig(similarity=2))
    with pytest.raises(DataError, match=r"absent.jsonl: no such file"):
        lint(data, LintConfig(against=["absent.jsonl"]))
    broken = write(tmp_path / "b.jsonl", ["{"])
    with pytest.raises(DataError, match=r"b\.jsonl: line 1: not JSON"):
        lint(data, LintConfig(against=[broken]))


# ---------------------------------------------------------------------------------------------------------------
# Real rows
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "longer"),
    [
        ("preference/hh_helpful", {"identical_pair": 4}, 0.554),
        ("preference/ultrafeedback_binarized", {"identical_pair": 2, "empty_response": 3, "score_tie": 94}, 0.54),
        ("preference/politeness", {"identical_pair": 3}, 0.506),
        ("preference/llamafactory_dpo_zh", {"duplicate": 10}, 0.628),
        ("safety/hh_harmless", {}, 0.459),
    ],
)
def test_real_rows_have_the_defects_that_were_counted_in_them(name: str, expected: Json, longer: float) -> None:
    """The figures of the folder's own account; its share of longer answers counts equal lengths as not longer."""
    paths = [REAL / f"{name}.{split}.jsonl.gz" for split in ("train", "test")]
    if not all(path.is_file() for path in paths):
        pytest.skip("the real rows are not here")
    report = lint(DataConfig(path=str(paths[0]), eval_path=str(paths[1])), LintConfig(similarity=0))
    told = {
        kind: n
        for kind, n in report.findings.counts.items()
        if kind in {*expected, *(k for k in KINDS if KINDS[k].error)}
    }
    assert told == expected
    assert report.length.right / report.rows == pytest.approx(longer, abs=0.003)  # empty answers are left out


def test_real_questions_are_found_in_rows_that_hold_them(tmp_path: Path) -> None:
    """MINT's tasks are questions of GSM8K's test rows, among others; the account flags 37 of them."""
    path, benchmark = REAL / "trees" / "mint_trees.train.jsonl.gz", REAL / "math" / "gsm8k.test.jsonl.gz"
    if not (path.is_file() and benchmark.is_file()):
        pytest.skip("the real rows are not here")
    report = lint(DataConfig(path=str(path), limit=30), LintConfig(benchmark=[str(benchmark)], similarity=0))
    tasks = {row.line: row.value["dataset"] for row in read_rows(str(path), limit=30)}
    hit = Counter(tasks[line] for line in found(report)["benchmark"])
    assert hit["gsm8k"] == sum(dataset == "gsm8k" for dataset in tasks.values())
