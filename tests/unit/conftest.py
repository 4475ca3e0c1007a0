"""A stand-in for an OpenAI-compatible chat endpoint, on the loopback, for whatever asks one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Asked = dict[str, Any]
"""The JSON body of a request."""


@dataclass
class ChatServer:
    """``answer(asked, number)`` gives the text of a reply, or a status other than 200 with headers."""

    url: str = ""
    answer: Callable[[Asked, int], str | tuple[int, dict[str, str]]] = lambda asked, number: ""
    asked: list[Asked] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """A server of its own for each test; no key is in the environment."""
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append(asked)
                server.keys.append(self.headers.get("Authorization"))
                number = len(server.asked)
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                said = server.answer(asked, number)
            finally:
                with server.lock:
                    server.at_once -= 1
            status, headers = said if isinstance(said, tuple) else (200, {})
            body: dict[str, Any] = {"error": {"message": f"status {status}"}}
            if isinstance(said, str):
                message = {"role": "assistant", "content": said}
                body = {
                    "id": "1", "object": "chat.completion", "created": 0, "model": asked["model"],
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                }  # fmt: skip
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(data)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
