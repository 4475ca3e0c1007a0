"""An endpoint asked many things: cached, patient, few at a time, and silent about its key."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import ConfigError
from alignlab.judges.endpoint import Endpoint, EndpointConfig

SOON = {"retry-after-ms": "1"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))


def questions(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"question {number}"}] for number in range(count)]


def endpoint(server: Any, **settings: Any) -> Endpoint:
    return Endpoint("judge-1", EndpointConfig(base_url=server.url, **settings))


def echo(asked: dict[str, Any], number: int) -> str:
    return f"about {asked['messages'][0]['content']}"


def test_each_thing_is_asked_once_and_a_rerun_asks_nothing(chat_server: Any) -> None:
    chat_server.answer = echo
    three = questions(3)
    told: list[tuple[int, int]] = []
    replies = endpoint(chat_server).ask([*three, three[1]], lambda done, of: told.append((done, of)))
    assert [reply.text for reply in replies] == [f"about question {n}" for n in (0, 1, 2, 1)]
    assert (replies[0].tokens_in, replies[0].tokens_out) == (100, 10)
    assert len(chat_server.asked) == 3
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert endpoint(chat_server).ask(three) == replies[:3]
    assert len(chat_server.asked) == 3
    # Another setting is another question.
    endpoint(chat_server, temperature=None, max_tokens=None, extra={"max_completion_tokens": 5}).ask(three[:1])
    assert len(chat_server.asked) == 4
    assert chat_server.asked[0]["temperature"] == 0.0
    assert chat_server.asked[0]["max_tokens"] == 1024
    assert {name: v for name, v in chat_server.asked[3].items() if name != "messages"} == {
        "model": "judge-1", "max_completion_tokens": 5,
    }  # fmt: skip


def test_an_interrupted_list_goes_on_with_what_is_missing(chat_server: Any) -> None:
    chat_server.answer = lambda asked, number: echo(asked, number) if number <= 4 else (400, {})
    with pytest.raises(ConfigError, match="refuses the request"):
        endpoint(chat_server, concurrency=1).ask(questions(10))
    begun = len(chat_server.asked)
    assert begun in (5, 6)  # the fifth was refused; one more may have been on its way
    chat_server.answer = echo
    replies = endpoint(chat_server, concurrency=1).ask(questions(10))
    assert [reply.text for reply in replies] == [f"about question {n}" for n in range(10)]
    assert len(chat_server.asked) == begun + 6  # four were kept


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_tried_again(chat_server: Any, status: int) -> None:
    chat_server.answer = lambda asked, number: (status, SOON) if number < 3 else "at last"
    assert endpoint(chat_server).ask(questions(1))[0].text == "at last"
    assert len(chat_server.asked) == 3


def test_a_request_that_takes_too_long_is_tried_again(chat_server: Any) -> None:
    def slow_at_first(asked: dict[str, Any], number: int) -> str:
        time.sleep(0.4 if number == 1 else 0)
        return "in time"

    chat_server.answer = slow_at_first
    assert endpoint(chat_server, timeout=0.15).ask(questions(1))[0].text == "in time"
    assert len(chat_server.asked) == 2


def test_trouble_that_stays_is_one_line_and_keeps_what_came(chat_server: Any) -> None:
    chat_server.answer = lambda asked, number: "fine" if number == 1 else (429, SOON)
    with pytest.raises(ConfigError, match=r"gave no reply in 3 tries .*the same command goes on") as raised:
        endpoint(chat_server, concurrency=1, max_retries=2).ask(questions(2))
    assert "\n" not in str(raised.value)
    assert endpoint(chat_server).known(questions(2)[0]) is not None
    assert endpoint(chat_server).known(questions(2)[1]) is None


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "refuses the key in the environment variable JUDGE_KEY"), (403, "refuses the key"),
     (404, "has no model judge-1"), (400, "refuses the request")],
)  # fmt: skip
def test_a_refusal_is_not_tried_again_and_never_shows_the_key(
    chat_server: Any, monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "the-very-key")
    chat_server.answer = lambda asked, number: (status, {})
    with pytest.raises(ConfigError, match=said) as raised:
        endpoint(chat_server, api_key_env="JUDGE_KEY").ask(questions(1))
    assert "the-very-key" not in str(raised.value)
    assert chat_server.keys == ["Bearer the-very-key"]


def test_the_key_is_in_no_file(chat_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the-very-key")
    chat_server.answer = echo
    endpoint(chat_server).ask(questions(1))
    (file,) = (tmp_path / "cache").rglob("*.json")
    assert "question 0" in file.read_text()
    assert "the-very-key" not in file.read_text()


def test_without_a_key_only_an_endpoint_of_ones_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="no key in the environment variable OPENAI_API_KEY"):
        Endpoint("gpt", EndpointConfig()).ask(questions(1))


def test_no_more_at_a_time_than_allowed(chat_server: Any) -> None:
    def slow(asked: dict[str, Any], number: int) -> str:
        time.sleep(0.02)
        return "x"

    chat_server.answer = slow
    endpoint(chat_server, concurrency=3).ask(questions(12))
    assert 1 < chat_server.most_at_once <= 3


def test_the_estimate_counts_what_is_not_cached(chat_server: Any) -> None:
    chat_server.answer = echo
    judge = endpoint(chat_server, max_tokens=50, price_in=2.0, price_out=10.0)
    texts = [[{"role": "user", "content": "x" * 4000}], [{"role": "user", "content": "y" * 8000}]]
    first = judge.estimate([*texts, texts[0]])
    # 4000 / 4 + 16 and 8000 / 4 + 16 tokens in, 2 x 50 out at most; prices are by the million.
    assert (first.asked, first.cached, first.tokens_in, first.most_out) == (2, 0, 3032, 100)
    assert first.least == pytest.approx(3032 * 2 / 1e6)
    assert first.most == pytest.approx(3032 * 2 / 1e6 + 100 * 10 / 1e6)
    judge.ask(texts[:1])
    again = judge.estimate(texts)
    assert (again.asked, again.cached, again.tokens_in) == (1, 1, 2016)
    unbounded = endpoint(chat_server, max_tokens=None).estimate(texts)
    assert (unbounded.most_out, unbounded.least, unbounded.most) == (None, None, None)


def test_a_damaged_reply_is_asked_again(chat_server: Any, tmp_path: Path) -> None:
    chat_server.answer = echo
    endpoint(chat_server).ask(questions(1))
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text('{"reply": {"text"')
    assert endpoint(chat_server).ask(questions(1))[0].text == "about question 0"
    assert len(chat_server.asked) == 2


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match=r"judge\.base_url"):
        Endpoint("gpt", EndpointConfig(base_url=url))
