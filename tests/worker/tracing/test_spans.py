"""The spans that a worker's attempts become, and what is said of a collector that does not take them."""

from __future__ import annotations

import contextlib
import logging
import os
import socketserver
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.otlp import Collector, collecting
from worker.tracing import exporter, submissions
from worker.tracing.attempts import Attempt
from worker.tracing.context import TraceContext, endpoint_of, shown
from worker.tracing.spans import AttemptSpans

TRACE, SPAN = "b" * 32, "c" * 16


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        yield made


def attempt_of(job_id: str, **fields: Any) -> dict[str, Any]:
    return Attempt(job_id, TraceContext(TRACE, SPAN)).as_json() | fields


def test_no_attempt_loses_the_spans_that_are_sent_with_it(collector: Collector) -> None:
    """What a record or a message says cannot keep others' spans from being encoded."""
    made = AttemptSpans(1)
    wild = [-(10**320), -1, 10**30, 1 << 63]
    for number, at in enumerate(wild):
        stages = [["claim", at, at, {"size": at}, []]]
        made.make(attempt_of(f"wild {number}", queued=at, began=at, ended=at, stages=stages))
    made.make(attempt_of("half \ud800", attributes={"worker": "\udfff"}, error=["ValueError", "\ud800"]))
    made.make(attempt_of("honest"))
    made.end()
    found = {span.attributes.get("smallcat.job.id") for span in collector.spans()}
    assert found - {None} == {*(f"wild {number}" for number in range(len(wild))), "half \\ud800", "honest"}


@contextlib.contextmanager
def answering(first: bytes, then: bytes = b"") -> Iterator[int]:
    """A collector of another kind, on this port: what it answers, and what it adds bit by bit for ever."""
    ended = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(1 << 16)
                self.request.sendall(first)
                while then and not ended.wait(0.02):
                    self.request.sendall(then)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            ended.set()
            server.shutdown()
            thread.join()


OK = b"HTTP/1.1 200 OK\r\n"
#: The user, the password, an option and a header.
SECRETS = ("bob-the-user", "S3CRETPW", "optiontoken", "headertoken", "brokentoken")


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (OK + b"Content-Length: 100000\r\n\r\n", b"x", "Spans cannot be sent"),
        (OK + b"Content-Length: 100000\r\n\r\n", b"", "Spans cannot be sent"),
        (OK + b"X-Never-Ends: ", b"x", "The last spans could not be sent"),
        (b"HTTP/1.1 302 X\r\nLocation: https://u:S3CRETPW@else.example/x\r\nContent-Length: 0\r\n\r\n",
         b"", "it answers 302, a redirect to https://***@else.example/x"),
        (b"HTTP/1.1 304 X\r\nContent-Length: 0\r\n\r\n", b"", "it answers 304, a redirect to nowhere"),
        (b"HTTP/1.1 401 X\r\nContent-Length: 0\r\n\r\n", b"", "401"),
        (b"no HTTP at all\r\n\r\n", b"", "Spans cannot be sent"),
    ],
)  # fmt: skip
def test_a_collector_that_does_not_take_spans_is_a_line_without_secrets_and_holds_nobody_up(
    first: bytes,
    then: bytes,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.2")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=headertoken, brokentoken")
    with answering(first, then) as port, caplog.at_level(logging.DEBUG):
        place = f"{SECRETS[0]}:{SECRETS[1]}@127.0.0.1:{port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://{place}/v1/traces?key={SECRETS[2]}")
        made = AttemptSpans(1)
        made.make(attempt_of("a" * 32))
        began_s = time.monotonic()
        made.end()
        assert time.monotonic() - began_s < 3
    told = [record.getMessage() for record in caplog.records if record.name == "smallcat.tracing"]
    assert [said in each for each in told] == [True], told
    assert f"***@127.0.0.1:{port}" in told[0]
    everything = "\n".join(record.getMessage() for record in caplog.records if "urllib3" not in record.name)
    assert [each for each in SECRETS if each in everything] == []


@pytest.mark.parametrize("kind", ["worker", "producer"])
def test_without_the_extra_the_password_is_not_said_either(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(
        "OTEL_EXPORTER_OTLP_ENDPOINT", "http://bob-the-user:S3CRETPW@collector:4318?key=optiontoken"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(submissions, "_own", {})
    assert (
        exporter.begin() or None if kind == "worker" else submissions._made(endpoint_of(os.environ))
    ) is None
    [record] = caplog.records
    assert "Nothing is traced to http://***@collector:4318: " in record.getMessage()


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("http://collector:4318", "http://collector:4318"),
        ("http://bob:p@collector:4318/v1", "http://***@collector:4318/v1"),
        ("http://token@collector", "http://***@collector"),
        ("http://bob:a?b#c://d/e@f@collector", "http://***@collector"),
        ("bob:p@collector:4318", "***@collector:4318"),
        ("http://collector/x?key=1#y", "http://collector/x"),
    ],
)
def test_an_endpoint_is_shown_without_its_secrets(endpoint: str, said: str) -> None:
    assert shown(endpoint) == said
