"""Servers that a run should not depend on: one that never answers, and as much of wandb's as a run's start needs."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class Silent:
    """Takes connections, counts them, and never says a word."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def _accept(self) -> None:
        while True:
            try:
                self.connections.append(self._listener.accept()[0])
            except OSError:
                return

    def __enter__(self) -> Silent:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            connection.close()


class Tracker:
    """Answers wandb's first questions, so that a run begins online; :meth:`die` breaks off in the middle."""

    def __init__(self) -> None:
        tracker = self
        self.asked: list[str] = []
        self.dead = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if tracker.dead.is_set():
                    self.connection.close()
                    return
                tracker.asked.append(self.path)
                answer = json.dumps(_answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def die(self) -> None:
        """No further answer; connections are refused."""
        self.dead.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Tracker:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.dead.is_set():
            self.die()


def _answer(path: str, body: bytes) -> dict[str, Any]:
    """What wandb's service takes for a new run; to everything else, an empty object."""
    if not path.endswith("/graphql"):
        return {"limits": {}}
    if b"upsertBucket" not in body:
        return {
            "data": {
                "viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}"},
                "serverInfo": {"features": []},
            }
        }
    bucket = {
        "id": "cnVu", "name": "run", "displayName": "run", "description": "", "config": "{}", "sweepName": None,
        "historyLineCount": 0, "project": {"id": "p", "name": "alignlab", "entity": {"id": "e", "name": "e"}},
    }  # fmt: skip
    return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
