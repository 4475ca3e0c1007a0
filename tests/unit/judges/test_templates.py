"""What a judge is sent, and what counts as a verdict."""

from __future__ import annotations

import pytest

from alignlab.judges.templates import TEMPLATES, Ranking, request_text


def test_a_pair_is_shown_in_the_order_given() -> None:
    system, user = TEMPLATES["pairwise"].messages("What is 2 + 2?", ("four", "five"))
    assert (system["role"], user["role"]) == ("system", "user")
    text = user["content"]
    assert (
        text.index("2 + 2")
        < text.index("Answer A begins")
        < text.index("four")
        < text.index("Answer B")
        < text.index("five")
    )


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is right.\n[[A]]", 1.0),
        ("**[[B]]**", 0.0),
        ("Both will do.\n[[tie]]\n", 0.5),
        ("I thought of [[A]] first.\nVerdict: [[b]]\n```", 0.0),
        ("[[A]] or [[B]]", None),  # two verdicts
        ("[[A]]\nBut B is better in parts.", None),  # not in the last line
        ("A", None),
        ("[[C]]", None),
        ("", None),
    ],
)
def test_verdict_of_a_pair(reply: str, verdict: float | None) -> None:
    assert TEMPLATES["pairwise"].read(reply, 2) == verdict


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good.\n[[8]]", 8.0), ("[[7.5]]", 7.5), ("[[10]]", 10.0), ("[[0]]", None), ("[[11]]", None), ("[[-3]]", None),
        ("8/10", None), ("From [[3]] to [[4]]", None), ("The rating: [[3]] of 10", 3.0),
    ],
)  # fmt: skip
def test_score(reply: str, score: float | None) -> None:
    assert TEMPLATES["honesty"].read(reply, 1) == score


@pytest.mark.parametrize(
    ("reply", "ranking"),
    [
        # Answer 2 is best, then 3, then 1: the ranks of 1, 2, 3 are 3, 1, 2.
        ('Why.\n{"scores": [2, 5, 4.5], "ranking": [2, 3, 1]}', Ranking((2.0, 5.0, 4.5), (3, 1, 2))),
        ('```json\n{\n "scores": [2, 5, 4],\n "ranking": [2, 3, 1]\n}\n```\n', Ranking((2.0, 5.0, 4.0), (3, 1, 2))),
        ('{"scores": [2, 5, 4], "ranking": [2, 3, 1]} That is all.', None),
        ('{"scores": [2, 5], "ranking": [2, 3, 1]}', None),
        ('{"scores": [2, 5, 6], "ranking": [2, 3, 1]}', None),
        ('{"scores": [2, true, 4], "ranking": [2, 3, 1]}', None),
        ('{"scores": [2, 5, 4], "ranking": [2, 2, 1]}', None),
        ('{"scores": [2, 5, 4], "ranking": [1, 0, 2]}', None),  # numbered from 1, as they were shown
        ('{"scores": [2, 5, 4], "ranking": ["2", "3", "1"]}', None),
        ('{"scores": [2, 5, 4]}', None),
        ('{"scores": oops}', None),
        ("2 > 3 > 1", None),
    ],
)
def test_ranking(reply: str, ranking: Ranking | None) -> None:
    assert TEMPLATES["ranking"].read(reply, 3) == ranking


def test_every_template_asks_for_what_it_reads() -> None:
    for template in TEMPLATES.values():
        count = {"pair": 2, "score": 1, "ranking": 4}[template.kind]
        system = template.messages("q", ["a"] * count)[0]["content"]
        assert {"pair": "[[tie]]", "score": "[[4]]", "ranking": '"ranking": [all 4 answers'}[template.kind] in system


def test_a_conversation_names_its_speakers() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert request_text(turns) == "User: a\n\nAssistant: b\n\nUser: c"
    assert request_text(turns[:1]) == request_text("a") == "a"
