"""``alignlab evaluate ... judge=`` against a stand-in endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
ANSWER = re.compile(r"=== Answer ?\w* begins ===\n(.*?)\n=== Answer ?\w* ends ===", re.DOTALL)


def shown(asked: dict[str, Any]) -> list[str]:
    return ANSWER.findall(asked["messages"][1]["content"])


def longer(asked: dict[str, Any], number: int) -> str:
    first, second = map(len, shown(asked))
    return "Longer.\n" + ("[[tie]]" if first == second else "[[A]]" if first > second else "[[B]]")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(home: Path) -> tuple[Path, Path]:
    """What ``sample`` prints for four prompts, and other answers to three of them and to one more."""
    ask = [[{"role": "user", "content": f"Tell me about {what}."}] for what in ("a", "b", "c", "d")]
    mine = write(
        home / "mine.jsonl", [{"id": str(i), "prompt": p, "texts": ["long answer"]} for i, p in enumerate(ask)]
    )
    rows = [{"instruction": f"Tell me about {what}.", "output": text} for what, text in
            (("a", "short"), ("b", "a much longer answer"), ("c", "long answer"), ("e", "x"))]  # fmt: skip
    return mine, write(home / "other.jsonl", rows)


@pytest.fixture
def judge(chat_server: Any) -> list[str]:
    """The words that name the stand-in."""
    return ["judge=judge-1", f"judge.base_url={chat_server.url}"]


def test_two_files_in_both_orders(run: Run, files: tuple[Path, Path], judge: list[str], chat_server: Any) -> None:
    chat_server.answer = longer
    words = ["evaluate", str(files[0]), *judge, f"against={files[1]}", "judge.price_in=1", "judge.price_out=2"]
    dry = run(*words, "judge.dry_run=true")
    assert dry.code == 0, dry.err
    assert "calls    4: 0 answered before (cache), 4 to ask" in dry.out  # a and b, both orders; c is the same text
    assert "cost 0.00 to 0.01" in dry.out  # at most 4 x 1024 tokens out at 2 a million
    assert chat_server.asked == []
    found = run(*words, "--json").json
    # a: "long answer" beats "short"; b: it loses; c: the same text.
    assert (found["figures"]["wins"], found["figures"]["losses"], found["figures"]["identical"]) == (1, 1, 1)
    assert found["figures"]["win_rate"]["value"] == 0.5
    assert found["figures"]["position"] == {
        "changed": found["figures"]["position"]["changed"], "shown_first_wins": 0.5, "verdicts": 4,
    }  # fmt: skip
    assert found["figures"]["position"]["changed"]["value"] == 0.0
    assert found["figures"]["length"]["longer_wins"]["value"] == 1.0
    assert (found["prompts"], found["unmatched"]) == (3, 2)  # d and e were answered by one side only
    assert found["asked"] == {"calls": 4, "tokens_in": 400, "tokens_out": 40, "cost": pytest.approx(480 / 1e6)}
    pairs = sorted(map(tuple, map(shown, chat_server.asked)))
    assert pairs == sorted(
        [("long answer", "short"), ("short", "long answer"), ("long answer", "a much longer answer"),
         ("a much longer answer", "long answer")]
    )  # fmt: skip
    again = run(*words)
    assert "4 answered before (cache), 0 to ask" in again.out
    assert len(chat_server.asked) == 4


@pytest.mark.parametrize(("always", "share"), [("A", "1.000"), ("B", "0.000")])
def test_a_judge_of_positions_is_seen_through(
    run: Run, files: tuple[Path, Path], judge: list[str], chat_server: Any, always: str, share: str
) -> None:
    chat_server.answer = lambda asked, number: f"[[{always}]]"
    answer = run("evaluate", str(files[0]), *judge, f"against={files[1]}", "judge.temperature=0.1")
    assert answer.code == 0, answer.err
    assert "win rate 0.500" in answer.out
    assert "changes with the order in 1.000" in answer.out
    assert f"the answer shown first gets {share} of 4 verdicts" in answer.out


def test_what_is_no_verdict_is_counted(run: Run, files: tuple[Path, Path], judge: list[str], chat_server: Any) -> None:
    about_a = lambda asked: "about a." in asked["messages"][1]["content"]  # noqa: E731
    chat_server.answer = lambda asked, number: longer(asked, number) if about_a(asked) else "Hard to say."
    words = ["evaluate", str(files[0]), *judge, f"against={files[1]}", "judge.temperature=0.2"]
    found = run(*words, "--json").json["figures"]
    assert (found["prompts"], found["incomplete"], found["unparsable"]) == (2, 1, 2)
    chat_server.answer = lambda asked, number: "Hard to say."
    answer = run(*words[:-1], "judge.temperature=0.3")
    assert answer.code == 2
    assert "none of 4 replies holds a verdict" in answer.err
    assert "Hard to say." in answer.err


def test_scores_of_one_side_and_of_two(run: Run, files: tuple[Path, Path], judge: list[str], chat_server: Any) -> None:
    chat_server.answer = lambda asked, number: f"[[{min(10, len(shown(asked)[0]))}]]"
    words = ["evaluate", str(files[0]), *judge, "judge.template=honesty"]
    found = run(*words, "--json").json
    (side,) = found["figures"]["sides"].values()
    assert (side["mean"]["value"], side["prompts"]) == (10.0, 4)  # "long answer" has 11 characters
    found = run(*words, f"against={files[1]}", "--json").json
    # Against "short" (5), 20 characters (10) and the same: 10 - 5, 10 - 10, 10 - 10.
    (difference,) = found["figures"]["differences"].values()
    assert difference["difference"]["value"] == pytest.approx(5 / 3)
    twice = run(*words, f"against={files[0]}", "--json").json
    assert twice["sides"] == [str(files[0]), f"{files[0]} (2)"]
    assert twice["figures"]["differences"][f"{files[0]} (2)"]["difference"]["value"] == 0.0


def test_a_ranking_is_shown_in_an_order_and_its_reverse(
    run: Run, home: Path, files: tuple[Path, Path], judge: list[str], chat_server: Any
) -> None:
    def by_length(asked: dict[str, Any], number: int) -> str:
        answers = shown(asked)
        order = sorted(range(len(answers)), key=lambda i: -len(answers[i]))
        best = {place: 5 - 2 * n for n, place in enumerate(order)}
        return json.dumps({"scores": [best[i] for i in range(len(answers))], "ranking": [i + 1 for i in order]})

    chat_server.answer = by_length
    prompts = [f"Tell me about {what}." for what in ("a", "b")]
    third = write(
        home / "third.jsonl", [{"instruction": p, "output": "by far the longest of all answers"} for p in prompts]
    )
    words = ["evaluate", str(files[0]), *judge, "judge.template=ranking", f"against=[{files[1]},{third}]"]
    found = run(*words, "--json").json
    sides = {Path(name).name: one for name, one in found["figures"]["sides"].items()}
    assert sides["third.jsonl"]["rank"]["value"] == 1.0
    assert sides["third.jsonl"]["score"]["value"] == 5.0
    # "long answer" is second for a and last for b.
    assert sides["mine.jsonl"]["rank"]["value"] == 2.5
    assert sides["mine.jsonl"]["score"]["value"] == 2.0  # 3 and 1
    assert found["figures"]["position"]["changed"]["value"] == 0.0
    orders = list(map(shown, chat_server.asked))
    assert len(orders) == 4
    assert sum(one[::-1] in orders for one in orders) == 4


def test_a_run_against_the_rows_own_answers(
    run: Run, home: Path, settings: list[str], judge: list[str], chat_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's answers are generated once; the figures and every verdict stand in its folder."""
    trained = run("train", *settings, "run.name=judged")
    assert trained.code == 0, trained.err
    chat_server.answer = longer
    words = ["evaluate", "runs/judged", *judge, "against=rows", "eval.max_new_tokens=4", "prompts=3"]
    answer = run(*words)
    assert answer.code == 0, answer.err
    assert "3 prompts, judged against rows" in answer.out
    (file,) = (home / "runs/judged/eval").glob("sums-judge-*.json")
    kept = json.loads(file.read_text())
    assert len(kept["verdicts"]) == 3
    assert kept["verdicts"][0].keys() == {"prompt", "forward", "swapped"}
    monkeypatch.setattr("alignlab.judges.sides.sampled", lambda *_: pytest.fail("generated twice"))
    assert run(*words).code == 0
    wrong = run(*words, "judge.condition={phrasing: 1}")
    assert wrong.code == 2
    assert "knows no conditions" in wrong.err


def test_a_conditioned_run_is_asked_under_the_condition_and_the_judge_does_not_see_it(
    run: Run, home: Path, small_model: Path, judge: list[str], chat_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.measuring.verification import Answer

    seen: list[str] = []

    def answered(config: Any, prompts: list[Any], verb: str) -> Any:
        for prompt in prompts:
            seen.append(prompt.messages[-1]["content"])
            yield Answer(prompt, ["fine"], [{}])

    monkeypatch.setattr("alignlab.judges.sides.sampled", answered)
    chat_server.answer = lambda asked, number: "[[6]]"
    words = ["evaluate", str(small_model), "objective=cpsft", "data=sums", "data.options={rows: 4, eval_rows: 2}",
             "judge.condition={phrasing: 1}", "prompts=2"]  # fmt: skip
    answer = run(*words, *judge)
    assert answer.code == 0, answer.err
    assert [text.startswith("<Phrasing: 1>") for text in seen] == [True, True]
    assert not any("<Phrasing" in asked["messages"][1]["content"] for asked in chat_server.asked)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["judge="], "name the model that judges"),
        (["judge.template=pairs", "against=rows"], "did you mean pairwise"),
        (["judge.template=pairwise"], "compares two: give one against=RUN|FILE|rows, not 0"),
        (["judge.template=ranking"], "ranks several"),
        (["judge.concurrency=0"], "judge.concurrency: 0 (expected 1 or more)"),
        (["judge.timeout=soon"], "judge.timeout: soon (expected a number)"),
        (["judge.price_in=1"], "a cost needs both"),
        (["judge.base_url=localhost:80"], "expected http://host:port/v1"),
        (["judge.api_key=sk-aaaaaaaaaaaaaaaaaaaaaaaa"], "put it into the environment"),
        (["judge.api_key_env=sk-aaaaaaaaaaaaaaaaaaaaaaaa"], "put it into the environment"),
        (["judge.modle=x"], "judge.modle"),
        (["against=rows"], "against=rows: data is missing"),
        (["against=empty.jsonl"], "holds no answers to judge"),
        (["against=elsewhere.jsonl"], "no prompt was answered by all of"),
        (["against=./missing"], "no model folder at ./missing"),
        (["judge.condition={helpfulness: 5}"], "the answers in a file are there already"),
        (["rm=x"], "rm= and judge= are several measurements"),
        (["front=[a]"], "front= goes with control=true, not with judge=MODEL"),
    ],
)
def test_wrong_input_is_one_line(
    run: Run, home: Path, files: tuple[Path, Path], judge: list[str], words: list[str], said: str
) -> None:
    write(home / "empty.jsonl", [{"prompt": "Tell me about a."}])
    write(home / "elsewhere.jsonl", [{"instruction": "Something else.", "output": "x"}])
    given = {word.partition("=")[0] for word in words}
    kept = [word for word in judge if word.partition("=")[0] not in given]
    answer = run("evaluate", str(files[0]), *kept, *words)
    assert answer.code == 2, answer
    assert said in answer.err
    assert answer.err.count("\n") == 1
    assert "aaaaaaaa" not in answer.err


def test_without_the_package_the_extra_is_named(
    run: Run, files: tuple[Path, Path], judge: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    answer = run("evaluate", str(files[0]), *judge, "judge.temperature=0.9")
    assert answer.code == 2
    assert "pip install 'alignlab[judge]'" in answer.err
