"""The server with a thousand streams, and with clients that read nothing: memory is flat, others go on."""

from __future__ import annotations

import socket
import time

import pytest

from tests.producer.http.conftest import NOBODYS, Api
from tests.producer.http.test_events import Stream
from tests.producer.http.test_server import own, process_of

__all__ = ["own"]
pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_a_thousand_streams_take_flat_memory(own: Api) -> None:
    """A minute of them: the server's memory does not grow, and other requests are answered."""
    job = own.call("POST", "/v1/jobs", {"prompt": "followed", "model": NOBODYS}).json
    streams = [Stream(own, job["links"]["events"]) for _ in range(1_000)]
    assert all(stream.next() for stream in streams)
    process = process_of(own.stack)
    before = process.memory_info().rss
    until_s = time.monotonic() + 60
    slowest = 0.0
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        assert own.call("POST", "/v1/jobs", {"prompt": "x", "model": NOBODYS}).status == 202
        slowest = max(slowest, time.monotonic() - began_s)
    assert process.memory_info().rss - before < 20_000_000
    assert slowest < 2
    own.call("DELETE", job["links"]["self"])
    assert {(stream.next() or {}).get("event") for stream in streams} <= {"cancelled"}


@pytest.mark.timeout(600)
def test_a_thousand_pages_take_flat_memory_and_are_read_for_once(own: Api) -> None:
    """Half a minute of so many streams of what goes on, while jobs are submitted."""
    for number in range(50):
        own.call("POST", "/v1/jobs", {"prompt": f"before {number}", "model": NOBODYS})
    streams = [Stream(own, "/v1/activity") for _ in range(1_000)]
    for stream in streams:
        first = stream.next()
        assert first is not None
        assert (first["event"], len(first["data"]["jobs"])) == ("jobs", 50)
    process = process_of(own.stack)
    before = process.memory_info().rss
    until_s, slowest, count = time.monotonic() + 30, 0.0, 0
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        answer = own.call("POST", "/v1/jobs", {"prompt": f"meanwhile {count}", "model": NOBODYS})
        assert answer.status == 202
        slowest, count = max(slowest, time.monotonic() - began_s), count + 1
    # Who does not read takes what the kernel holds for it, and no list of events.
    assert process.memory_info().rss - before < 60_000_000
    assert slowest < 5


def test_who_does_not_read_a_picture_harms_nobody(own: Api) -> None:
    """A hundred clients ask for much and read nothing of it: others are answered at once."""
    for number in range(30):
        own.call("POST", "/v1/jobs", {"prompt": "x" * 4_000 + str(number), "model": NOBODYS})
    head = f"GET /v1/jobs?limit=30 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {own.key}\r\n\r\n".encode()
    connections = []
    for _ in range(100):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.connect(("127.0.0.1", int(own.url.rpartition(":")[2])))
        connection.sendall(head * 4)
        connections.append(connection)
    began_s = time.monotonic()
    for _ in range(20):
        assert own.call("GET", "/healthz").status == 200
    assert own.call("POST", "/v1/jobs", {"prompt": "unharmed", "model": NOBODYS}).status == 202
    assert time.monotonic() - began_s < 10
    for connection in connections:
        connection.close()
