"""Spans of producers: by the application's own tracer where it has one, and none without an endpoint."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from worker.contract.webhook import hook_of
from worker.tracing import submissions
from worker.tracing.submissions import NO_SPAN, notification_span, request_span, send_span, sending

JOB = "a" * 32


class Application:
    """An application that traces itself."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider, self._exporter = provider, InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())


def application(monkeypatch: pytest.MonkeyPatch, provider: TracerProvider) -> Application:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return Application(provider)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    made = application(monkeypatch, TracerProvider())
    yield made
    made.provider.shutdown()


def test_a_job_is_below_the_applications_own_span(app: Application) -> None:
    with (
        app.provider.get_tracer("app").start_as_current_span("request") as request,
        sending(JOB, "q") as sent,
    ):
        message = sent.on({"headers": {"id": "x"}})
        hook = json.loads(sent.on_hook(hook_of("https://example.com/hook", "")))
    made = app.spans()[0]
    assert made.parent is not None
    assert made.parent.span_id == request.get_span_context().span_id
    assert made.attributes is not None
    assert made.attributes["messaging.destination.name"] == "q"
    parent = f"00-{made.context.trace_id:032x}-{made.context.span_id:016x}-01"
    assert message["headers"] == {"id": "x", "traceparent": parent}
    assert hook == {"url": "https://example.com/hook", "traceparent": parent}
    # Its notification goes on there.
    with notification_span(hook, {}) as told:
        assert told.trace == f"{made.context.trace_id:032x}"
    assert [span.name for span in app.spans()] == ["submit", "request", "webhook"]


def test_a_job_of_a_file_is_a_trace_of_its_own(app: Application) -> None:
    with app.provider.get_tracer("app").start_as_current_span("import"):
        send_span(JOB, "q", is_root=True).end()
    assert app.spans()[0].parent is None


def test_a_request_that_fails_says_so(app: Application) -> None:
    with pytest.raises(ValueError, match="no"), request_span("POST", {}, {}):
        raise ValueError("no")
    [span] = app.spans()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"
    assert not span.events


def test_a_job_that_is_not_sampled_says_so_to_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    app = application(monkeypatch, TracerProvider(sampler=ALWAYS_OFF))
    with sending(JOB, "q") as sent:
        assert sent.headers["traceparent"].endswith("-00")
        assert sent.trace == ""
    with notification_span(sent.headers, {}) as told:
        assert told is NO_SPAN
    assert app.spans() == []


def test_without_the_extra_a_warning_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector.example:4318")
    monkeypatch.setattr(submissions, "_own", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with sending(JOB, "q") as sent:
                assert sent.headers == {}
    [record] = caplog.records
    assert 'pip install "smallcat[tracing]"' in record.getMessage()


def test_without_an_endpoint_nothing_is_imported() -> None:
    program = """
import sys
import producer, producer.webhooks.sender, worker.tracing.exporter, worker.tracing.attempts
from worker.tracing.submissions import sending, request_span, notification_span
with sending("a" * 32, "q") as sent, request_span("POST", {}, {}), notification_span({}, {}):
    assert sent.headers == {}
    assert sent.on({"headers": {}}) == {"headers": {}}
    assert sent.on_hook("") == "" and sent.on_hook("{}") == "{}"
assert worker.tracing.exporter.begin() == ""
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
""".replace("import producer,", "import worker.tracing.exporter, producer,")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)
