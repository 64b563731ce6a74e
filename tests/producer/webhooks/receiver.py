"""A receiver of notifications, as customers have one: a real HTTP server whose answers a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.faults.harness import wait_until

#: What a receiver does with a request: writes its answer.
Answer = Callable[["Handler"], None]


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Handler(BaseHTTPRequestHandler):
    """Notes each request and gives the answer of its server."""

    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(size := int(self.headers["content-length"]))
        if len(body) < size:  # Its sender was killed.
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(Request(self.path, headers, body))
        self.server.answer(self)

    def status(self, number: int, **headers: str) -> None:
        self.send_response(number)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Receiver(ThreadingHTTPServer):
    """The server. `requests` are those that came."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.requests: list[Request] = []

    def handle_error(self, *_: Any) -> None:
        """Nothing: a sender that was killed reads no answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    def wait_for(self, count: int, timeout_s: float = 15.0) -> list[Request]:
        """The requests, when there are so many."""
        wait_until(f"{count} requests", lambda: len(self.requests) >= count, timeout_s)
        return self.requests


def ok(handler: Handler) -> None:
    """204."""
    handler.status(204)


@contextmanager
def receiving(answer: Answer = ok) -> Iterator[Receiver]:
    """A receiver that runs."""
    server = Receiver(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
