"""An OpenAI-compatible chat endpoint that is asked many things: concurrently, patiently, and each thing once.

Every reply is written to the cache as it comes, under a hash of all that was sent and where; a run that was interrupted
goes on with what is missing, and a rerun asks nothing.  Retries (408, 409, 429, 5xx, connections, time-outs, with
growing pauses or the server's ``Retry-After``) are the client library's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignlab.data import cache
from alignlab.durable import write_atomic
from alignlab.errors import ConfigError

OPENAI = "https://api.openai.com/v1"
KIND = "judge"
"""The cache's name for replies."""
BYTES_A_TOKEN = 4
"""For the estimate alone: English text, in the tokenizers of today's large models."""
AROUND = 16
"""Tokens that the endpoint's own template puts around a request."""

Messages = Sequence[Mapping[str, str]]


@dataclass
class EndpointConfig:
    """Where the judge is and how it is asked; set as ``judge.<name>``."""

    base_url: str | None = None
    """The endpoint, up to ``/v1``; default: OpenAI's."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; with a ``base_url`` of one's own it may be unset."""
    temperature: float | None = 0.0
    """null sends none, for models that take none."""
    max_tokens: int | None = 1024
    """Longest reply; null sends none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Sent with each request, e.g. ``{max_completion_tokens: 1024}``."""
    concurrency: int = 8
    """Requests under way at once."""
    max_retries: int = 6
    timeout: float = 120.0
    """Seconds that one request may take."""
    price_in: float | None = None
    """Price of a million tokens that are sent; for the cost that is printed first."""
    price_out: float | None = None
    """Price of a million tokens that come back."""
    dry_run: bool = False
    """Stop after the number of calls, tokens and cost."""


@dataclass(frozen=True)
class Reply:
    """What the judge wrote (``""``: nothing), why it ended, and the tokens that the endpoint counted."""

    text: str
    finish: str
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Estimate:
    """What a list of requests would take.  ``most_out`` None: no limit was set; costs None: without prices."""

    cached: int
    asked: int
    tokens_in: int
    most_out: int | None
    least: float | None
    most: float | None


class Endpoint:
    """One model behind one address."""

    def __init__(self, model: str, config: EndpointConfig) -> None:
        self.model, self.config = model, config
        self.url = (config.base_url or OPENAI).rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"judge.base_url: {config.base_url} (expected http://host:port/v1 or https://...)")
        sent: dict[str, Any] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        self._sent = {name: value for name, value in sent.items() if value is not None}
        said = {"url": self.url, "model": model, "extra": config.extra, **self._sent}
        self._folder = cache.entry(KIND, cache.key(said))

    def known(self, messages: Messages) -> Reply | None:
        """The reply that is in the cache; None where there is none."""
        try:
            return Reply(**json.loads(self._place(messages).read_text(encoding="utf-8"))["reply"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):  # damaged: ask again
            return None

    def estimate(self, requests: Sequence[Messages]) -> Estimate:
        """What asking ``requests`` (each once) would take, by the texts' sizes; what is known costs nothing."""
        distinct = self._distinct(requests)
        new = [one for one in distinct.values() if self.known(one) is None]
        sizes = [sum(len(message["content"].encode()) for message in one) for one in new]
        tokens_in = sum(size // BYTES_A_TOKEN + AROUND for size in sizes)
        most_out = None if self.config.max_tokens is None else len(new) * self.config.max_tokens
        least = most = None
        if self.config.price_in is not None and self.config.price_out is not None:
            least = tokens_in * self.config.price_in / 1e6
            most = None if most_out is None else least + most_out * self.config.price_out / 1e6
        return Estimate(len(distinct) - len(new), len(new), tokens_in, most_out, least, most)

    def ask(self, requests: Sequence[Messages], done: Callable[[int, int], None] = lambda i, n: None) -> list[Reply]:
        """The replies to ``requests``, in order; ``done(i, n)`` is told after each of the n that were not known.

        Raises :class:`ConfigError` without the package or the key, where the endpoint refuses, and where it still gives
        no reply after all retries; the replies that came are kept.
        """
        distinct = self._distinct(requests)
        found = {key: reply for key, one in distinct.items() if (reply := self.known(one)) is not None}
        new = {key: one for key, one in distinct.items() if key not in found}
        if new:
            client = self._client()
            pool = ThreadPoolExecutor(max_workers=self.config.concurrency)
            try:
                tasks = {pool.submit(self._one, client, one): key for key, one in new.items()}
                for count, task in enumerate(as_completed(tasks), 1):
                    found[tasks[task]] = task.result()
                    done(count, len(new))
            finally:
                pool.shutdown(cancel_futures=True)
                client.close()
        return [found[cache.key({"messages": list(one)})] for one in requests]

    def _distinct(self, requests: Sequence[Messages]) -> dict[str, Messages]:
        return {cache.key({"messages": list(one)}): one for one in requests}

    def _place(self, messages: Messages) -> Path:
        key = cache.key({"messages": list(messages)})
        return self._folder / key[:2] / f"{key}.json"

    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            raise ConfigError("evaluate judge= needs the openai package: pip install 'alignlab[judge]'") from None
        key = os.environ.get(self.config.api_key_env)
        if not key and self.config.base_url is None:
            raise ConfigError(
                f"judge: no key in the environment variable {self.config.api_key_env}; set it, name another "
                "(judge.api_key_env=NAME), or give judge.base_url= of an endpoint that needs none"
            )
        return openai.OpenAI(
            base_url=self.url, api_key=key or "none", max_retries=self.config.max_retries, timeout=self.config.timeout
        )

    def _one(self, client: Any, messages: Messages) -> Reply:
        import openai

        try:
            made = client.chat.completions.create(
                model=self.model, messages=list(messages), extra_body=self.config.extra or None, **self._sent
            )
            reply = _reply(made)
        except openai.OpenAIError as error:
            raise ConfigError(self._refusal(error)) from None
        except (AttributeError, IndexError, TypeError) as error:
            raise ConfigError(f"judge: {self.url} answers, but not as a chat endpoint does ({error})") from None
        place = self._place(messages)
        place.parent.mkdir(parents=True, exist_ok=True)
        record = {"model": made.model, "messages": list(messages), "reply": vars(reply)}
        write_atomic(place, json.dumps(record, ensure_ascii=False) + "\n")
        return reply

    def _refusal(self, error: Exception) -> str:
        """One line for what went wrong, without what the endpoint may have repeated of the key."""
        import openai

        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"judge: {self.url} refuses the key in the environment variable {self.config.api_key_env}"
        if isinstance(error, openai.NotFoundError):
            return f"judge: {self.url} has no model {self.model}, or is no chat endpoint (judge.base_url ends in /v1)"
        what = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, openai.RateLimitError | openai.InternalServerError | openai.APIConnectionError):
            return (
                f"judge: {self.url} gave no reply in {self.config.max_retries + 1} tries ({what}); the replies so far "
                "are kept, and the same command goes on"
            )
        return f"judge: {self.url} refuses the request: {what}"


def _reply(made: Any) -> Reply:
    choice, usage = made.choices[0], made.usage
    return Reply(
        choice.message.content or "", choice.finish_reason or "", getattr(usage, "prompt_tokens", 0) or 0,
        getattr(usage, "completion_tokens", 0) or 0,
    )  # fmt: skip
