"""W3C's Trace Context, and what OpenTelemetry's variables mean here."""

from __future__ import annotations

import pytest

from worker.tracing.context import TraceContext, endpoint_of, environment_of_exporter, why_not

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("parent", "is_sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        # Further flags, and a later version, which may have more parts.
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"01-{TRACE}-{SPAN}-01-what-comes", True),
    ],
)
def test_a_context_is_read_and_written(parent: str, is_sampled: bool) -> None:
    found = TraceContext.parse(parent, "vendor=1,other=2")
    assert found == TraceContext(TRACE, SPAN, is_sampled, "vendor=1,other=2")
    written = f"00-{TRACE}-{SPAN}-{int(is_sampled):02}"
    assert found.headers == {"traceparent": written, "tracestate": "vendor=1,other=2"}


@pytest.mark.parametrize(
    "parent",
    [
        *(None, 1, "", "x", f"00-{TRACE}-{SPAN}", f"00-{TRACE.upper()}-{SPAN}-01"),
        *(f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{SPAN}-01"),
        *(f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE}-{SPAN}-01\n"),
    ],
)
def test_what_is_no_context_counts_as_none(parent: object) -> None:
    assert TraceContext.parse(parent) is None


@pytest.mark.parametrize("state", [None, 1, "x" * 513, "a=\n", "a=\u202e"])
def test_a_state_that_cannot_be_passed_on_is_left_out(state: object) -> None:
    found = TraceContext.parse(f"00-{TRACE}-{SPAN}-01", state)
    assert found is not None
    assert found.headers.keys() == {"traceparent"}


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t"},
            "http://t",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "TRUE"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "otlp"}, "http://c"),
        ({"OTEL_SERVICE_NAME": "mine"}, ""),
    ],
)
def test_traces_go_where_opentelemetrys_variables_say(variables: dict[str, str], endpoint: str) -> None:
    assert endpoint_of(variables) == endpoint


def test_another_protocol_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not({}) == ""
    assert why_not({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}) == ""
    assert "is 'grpc': smallcat sends http/protobuf" in why_not({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    # That of traces counts.
    both = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    assert why_not(both) == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "smallcat[tracing]"' in why_not({})


def test_the_process_that_sends_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "REDIS_URL", "SMALLCAT_WEBHOOK_SECRET", "CELERY_X", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret-known")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "key=x")
    found = environment_of_exporter()
    assert "secret-known" not in found.values()
    assert found["OTEL_EXPORTER_OTLP_HEADERS"] == "key=x"
