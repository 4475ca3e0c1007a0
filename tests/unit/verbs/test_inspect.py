"""``alignlab inspect``: the preview of conditions, and ``--lint`` from the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
Json = dict[str, Any]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path.name


def rated(asked: str, *ratings: tuple[int, int]) -> Json:
    said = [{"response": f"answer {i}", "scores": {"help": h, "honesty": o}} for i, (h, o) in enumerate(ratings)]
    return {"instruction": asked, "completions": said}


def pair(asked: str, chosen: str = "good", rejected: str = "bad") -> Json:
    return {"prompt": [{"role": "user", "content": asked}], "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}]}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Conditions before training
# ---------------------------------------------------------------------------------------------------------------


def test_the_preview_of_cpo_counts_rows_and_changed_preferences(run: Run, home: Path, small_model: Path) -> None:
    """Honesty 1 asked of (5, 5) and (5, 1): the second wins, 5 - 0 against 5 - 4, where without it loses 6 to 10.  The
    last row is overlong and not counted.  Honesty 5 changes nothing."""
    write(
        home / "rated.jsonl",
        rated("a", (5, 5), (5, 1)),
        rated("b", (5, 5), (5, 1)),
        rated("long " * 99, (5, 5), (5, 1)),
    )
    words = [f"model={small_model}", "data=rated.jsonl", "data.max_length=100"]
    buckets = "[{condition: {honesty: 1}, max_count: 9}, {condition: {honesty: 5}, max_count: 1}]"
    asked = [*words, "objective=cpo", f"data.condition.buckets={buckets}"]
    found = run("inspect", *asked, "--json").json["manifest"]
    assert found["dropped"] == {"overlong": 1}
    assert found["conditions"] == {
        "<Honesty: 1>": {"rows": 2, "examples": 2, "changed": 2, "pairs": 2, "reversed": 2},
        "<Honesty: 5>": {"rows": 1, "examples": 1, "changed": 0, "pairs": 1, "reversed": 0},
    }
    text = run("inspect", *asked).out
    lines = [line.split() for line in text.splitlines() if "<Honesty" in line and "%" in line]
    assert lines == [["2", "2", "100.0%", "100.0%", "<Honesty:", "1>"], ["1", "1", "0.0%", "0.0%", "<Honesty:", "5>"]]
    assert "all 2 conditions" in text
    twice = [*asked, "data.path=null", "data.sources=[{path: rated.jsonl, weight: 2.0}]"]
    assert run("inspect", *[w for w in twice if w != "data=rated.jsonl"], "--json").json["manifest"]["conditions"][
        "<Honesty: 1>"
    ]["rows"] == 4  # fmt: skip


def test_the_preview_of_cpsft(run: Run, home: Path, small_model: Path) -> None:
    write(home / "one.jsonl", rated("a", (5, 5), (5, 1)))
    found = run("inspect", f"model={small_model}", "data=one.jsonl", "objective=cpsft", "--json").json
    assert found["manifest"]["conditions"] == {
        "<Help: 5> <Honesty: 5>": {"rows": 1, "examples": 1, "changed": 0, "pairs": 0, "reversed": 0},
        "<Help: 5> <Honesty: 1>": {"rows": 1, "examples": 1, "changed": 1, "pairs": 0, "reversed": 0},
    }


# ---------------------------------------------------------------------------------------------------------------
# The documentation
# ---------------------------------------------------------------------------------------------------------------


def test_the_documented_commands_run_as_they_stand(run: Run, home: Path, small_model: Path) -> None:
    """But for the model and the copy of the data set, which need a download."""
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("    alignlab inspect --lint")]
    assert len(commands) == 3
    write(home / "pairs.jsonl", pair("what is the one thing?"), pair("and which is the other?", "this"))
    write(home / "held.jsonl", pair("something else altogether"))
    write(home / "gsm8k.jsonl", {"question": "How many of the eggs are left when all are eaten?", "answer": "0 #### 0"})
    write(home / "copy.jsonl", rated("a", (5, 5), (1, 1)))
    replaced = {
        "model=smollm2": [f"model={small_model}"],
        "data=ultrafeedback": ["data=ultrafeedback", "data.path=copy.jsonl"],
    }
    for words in commands:
        answer = run(*[new for word in words for new in replaced.get(word, [word])])
        assert answer.code == 0, answer
    assert json.loads((home / "report.json").read_text())["benchmark"] == {"questions": 1, "too_short": 0}
    assert len((home / "cleaned.jsonl").read_text().splitlines()) == 2
    for name in ("cleaned.jsonl", "cleaned.left_out.jsonl"):
        (home / name).unlink()
    assert "--lint" in run("inspect", "--help").out


# ---------------------------------------------------------------------------------------------------------------
# Lint
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dirty(home: Path) -> str:
    rows = [pair(f"what is {i} and why does it matter so much?", f"it is {i * i}, good") for i in range(20)]
    return write(home / "dirty.jsonl", *rows, pair("same", "x", "x"), pair("empty", ""), rows[3], '{"half": "\\ud800"}')


def test_lint_needs_rows_alone(run: Run, home: Path, dirty: str) -> None:
    answer = run("inspect", "--lint", f"data={dirty}")
    assert answer.code == 1
    heads = [line.split()[:3] for line in answer.out.splitlines()]
    assert ["error", "malformed", "1"] in heads
    assert ["error", "identical_pair", "1"] in heads
    assert ["error", "empty_response", "1"] in heads
    assert ["warning", "duplicate", "1"] in heads
    assert "verdict  3 errors" in answer.out
    found = run("inspect", "--lint", f"data={dirty}", "--json").json
    assert found["errors"] == 3
    assert found["rows"] == 24
    assert found["findings"]["malformed"] == {"class": "error", "count": 1}
    entry = next(one for one in found["entries"] if one["finding"] == "malformed")
    assert (entry["file"], entry["line"], entry["reason"]) == ("dirty.jsonl", 24, "half_surrogate")


def test_warnings_alone_exit_0(run: Run, home: Path) -> None:
    write(home / "twice.jsonl", pair("first question of them"), pair("first question of them"), pair("something else"))
    answer = run("inspect", "--lint", "data=twice.jsonl")
    assert answer.code == 0
    assert "verdict  0 errors" in answer.out


def test_write_leaves_rows_out_with_a_reason_each_and_never_writes_over_a_file(
    run: Run, home: Path, dirty: str
) -> None:
    answer = run("inspect", "--lint", f"data={dirty}", "--write", "cleaned.jsonl", "--json")
    assert answer.code == 0, answer  # what was wrong is left out
    assert answer.json["written"] == {"path": "cleaned.jsonl", "kept": 20, "left_out": 4}
    lines = (home / dirty).read_text().splitlines()
    kept = [json.loads(line) for line in (home / "cleaned.jsonl").read_text().splitlines()]
    assert kept == [json.loads(line) for line in lines[:20]]
    out = [json.loads(line) for line in (home / "cleaned.left_out.jsonl").read_text().splitlines()]
    assert [(one["line"], [why["finding"] for why in one["reasons"]]) for one in out] == [
        (21, ["identical_pair"]), (22, ["empty_response"]), (23, ["duplicate"]), (24, ["malformed"]),
    ]  # fmt: skip
    assert out[2]["row"] == kept[3]
    assert out[2]["reasons"][0]["other"] == {"file": "dirty.jsonl", "line": 4}
    before = (home / "cleaned.jsonl").read_bytes()
    again = run("inspect", "--lint", f"data={dirty}", "--write", "cleaned.jsonl")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "cleaned.jsonl exists; overwrite=true replaces it" in again.err
    assert (home / "cleaned.jsonl").read_bytes() == before
    keep = run("inspect", "--lint", f"data={dirty}", "--write=cleaned.jsonl", "overwrite=true", "lint.keep=[duplicate]")
    assert keep.code == 0
    assert len((home / "cleaned.jsonl").read_text().splitlines()) == 21
    assert run("inspect", "--lint", "data=cleaned.jsonl").code == 0
    assert not list(home.glob(".cleaned*"))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--lint", "--write", "dirty.jsonl", "overwrite=true"], "is, or lies in, what is read"),
        (["--lint", "--write", "folder/c.jsonl", "data.path=folder"], "is, or lies in, what is read"),
        (["--lint", "--write", "nowhere/c.jsonl"], "no such folder"),
        (["--lint", "--write", "c.csv"], "name it ....jsonl"),
        (["--lint", "--write"], "--write needs a path"),
        (["--write", "c.jsonl"], "belongs to inspect --lint"),
        (["--lint", "lint.ngram=many"], "lint.ngram: many"),
        (["--lint", "lint.ngrams=3"], "unknown key 'lint.ngrams': did you mean lint.ngram?"),
        (["lint=maybe"], "lint: maybe (expected true or false)"),
        (["--lint", "lint.ngram=1"], "at least 2"),
        (["--lint", "lint.keep=[duplicat]"], "did you mean duplicate"),
        (["--lint", "lint.benchmark=absent.jsonl"], "absent.jsonl: no such file"),
        (["--lnt"], "--lnt"),
    ],
)
def test_wrong_words_exit_2_with_one_line(run: Run, home: Path, dirty: str, words: list[str], what: str) -> None:
    (home / "folder").mkdir(exist_ok=True)
    answer = run("inspect", f"data={dirty}", *words)
    assert answer.code == 2, answer
    assert what in answer.err
    assert "Traceback" not in answer.err
    assert not (home / "c.jsonl").exists()


def test_a_mixture_is_cleaned_source_by_source(run: Run, home: Path, dirty: str) -> None:
    answer = run("inspect", "--lint", "--write", "c.jsonl", f"data.sources=[{{path: {dirty}}}, {{path: {dirty}}}]")
    assert answer.code == 2
    assert "clean each by itself" in answer.err


def test_with_a_model_and_an_objective_the_template_is_looked_at(run: Run, home: Path, small_model: Path) -> None:
    rows = write(home / "chats.jsonl", pair("a question of some length"), pair("another, quite different one"))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    template += "{% if m.role == 'user' %}<|im_end|>\n{% endif %}"
    (home / "open.jinja").write_text(
        template + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    words = ["inspect", "--lint", f"data={rows}", f"model={small_model}", "objective=dpo"]
    assert run(*words).code == 0
    answer = run(*words, "model.chat_template=open.jinja", "--json")
    assert answer.code == 1
    assert answer.json["findings"]["no_terminator"] == {"class": "error", "count": 2}
    assert answer.json["entries"][0]["detail"] == "2 of 2 answers"
    short = run(*words, "data.max_length=20", "--json").json["findings"]
    assert set(short) == {"overlong"}
