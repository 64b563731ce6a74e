"""Spans, made and sent with OpenTelemetry's SDK. Its own variables (`OTEL_*`) say how, and where to."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import requests
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from worker.contract.versions import versions
from worker.tracing.context import TraceContext, endpoint_of, shown, without_secrets
from worker.tracing.parents import below, span_context

logger = logging.getLogger("smallcat.tracing")

#: Seconds that spans are tried to be sent, where OpenTelemetry's variables do not say: its own default would
#: hold up the end of a program by 10 s while nobody takes them.
TIMEOUT_S: Final = 3.0
#: Seconds beyond, at the end of a program: so that the log has the exporter's own reason.
_GRACE_S: Final = 0.5
#: Bytes of an answer that are read at a time.
_PART: Final = 1 << 16
#: The largest integer that a span can have.
_MAX_INT: Final = (1 << 63) - 1
#: The loggers of what sends spans: a line for each batch that cannot be sent, and each retry.
_NOISY: Final = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")


def provider_of(service: str, ids: IdGenerator | None = None, pid: int = 0) -> TracerProvider:
    """What makes and sends the spans of this process, or of the process `pid`.

    `service` is its name, unless OpenTelemetry's variables say another.
    """
    attributes: dict[str, Any] = {
        "service.version": versions(("smallcat",)).get("smallcat", ""),
        "process.pid": pid or os.getpid(),
    }
    said = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    if not said:
        attributes["service.name"] = service
    provider = TracerProvider(resource=Resource.create(attributes), id_generator=ids)
    is_said = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{name}TIMEOUT") for name in ("TRACES_", ""))
    own = any(name.endswith("_CREDENTIAL_PROVIDER") for name in os.environ if name.startswith("OTEL_"))
    logging.getLogger("opentelemetry.util.re").addFilter(_without_headers)
    exporter = OTLPSpanExporter(timeout=None if is_said else TIMEOUT_S, session=None if own else _Session())
    provider.add_span_processor(_Bounded(_Told(exporter)))
    return provider


def _timeout_s() -> float:
    """Seconds that spans are tried to be sent."""
    for name in ("TRACES_", ""):
        with contextlib.suppress(ValueError):
            said_s = float(os.environ.get(f"OTEL_EXPORTER_OTLP_{name}TIMEOUT", ""))
            return min(30.0, max(0.0, said_s))
    return TIMEOUT_S


def _without_headers(record: logging.LogRecord) -> bool:
    """OpenTelemetry's warning of headers that it cannot read quotes them."""
    record.msg, record.args = without_secrets(record.getMessage(), os.environ), ()
    return True


class _Session(requests.Session):
    """Requests whose answers are redirects have failed, and so have those whose answers take too long.

    OpenTelemetry's exporter follows no redirect and calls it a success; its timeout is for each byte.
    """

    def request(self, *args: Any, **options: Any) -> requests.Response:
        """As any session's. Raises `requests.RequestException`."""
        until_s = time.monotonic() + float(options.get("timeout") or TIMEOUT_S)
        response = super().request(*args, **{**options, "stream": True})
        if response.is_redirect or 300 <= response.status_code < 400:
            response.close()
            where = shown(response.headers.get("Location", "")) or "nowhere"
            raise requests.TooManyRedirects(
                f"it answers {response.status_code}, a redirect to {where}: set the endpoint to where the "
                "collector is"
            )
        while response.raw.read1(_PART):
            if time.monotonic() > until_s:
                response.close()
                raise requests.Timeout("its answer does not end")
        return response


class _Bounded(BatchSpanProcessor):
    """Its end waits no longer than spans are tried to be sent, whatever a collector does."""

    def shutdown(self) -> None:
        """Send what there is."""
        # The SDK's own method leaves its 30 s as they are.
        self._batch_processor.shutdown(timeout_millis=round((_timeout_s() + _GRACE_S) * 1000))


#: What the exporter of this thread has logged last: why it failed.
_logged = threading.local()


def _keep(record: logging.LogRecord) -> bool:
    _logged.why = record.getMessage()
    return False


class _Told(SpanExporter):
    """Another exporter. The log says once when spans cannot be sent, and once when they can again."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner, self._is_failing = inner, False
        self._is_sending = False
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(type(inner).__module__).addFilter(_keep)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        self._is_sending, _logged.why = True, ""
        try:
            result = self._inner.export(spans)
        finally:
            self._is_sending = False
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            where, why = shown(endpoint_of(os.environ)), without_secrets(_logged.why, os.environ)
            logger.warning("Spans cannot be sent to %s and are dropped: %s", where, why)
        elif self._is_failing and not is_failing:
            logger.warning("Spans are sent again.")
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        """Send no more. What is still being sent has had its time."""
        if self._is_sending:
            where = shown(endpoint_of(os.environ))
            logger.warning(
                "The last spans could not be sent to %s in %g s and are lost.", where, _timeout_s()
            )
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """As the other exporter's."""
        return self._inner.force_flush(timeout_millis)


class _GivenIds(IdGenerator):
    """Ids that were chosen elsewhere, each used once; others are random."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.span = self.trace = 0

    def generate_span_id(self) -> int:
        span, self.span = self.span, 0
        return span or self._random.generate_span_id()

    def generate_trace_id(self) -> int:
        given, self.trace = self.trace, 0
        return given or self._random.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        return True


class AttemptSpans:
    """Makes spans of attempts (`worker.tracing.attempts`). Not thread-safe. `pid`: the worker's."""

    def __init__(self, pid: int) -> None:
        self._ids = _GivenIds()
        self._provider = provider_of("smallcat-worker", self._ids, pid)
        self._tracer = self._provider.get_tracer("smallcat")

    def make(self, attempt: Mapping[str, Any]) -> None:
        """The spans of an attempt, as `Attempt.as_json` has it.

        One value that cannot be encoded would lose all spans that are sent together: none is passed on.
        """
        parent = None
        if attempt["parent"]:
            parent = below(TraceContext(attempt["trace"], attempt["parent"], True, attempt["state"]))
        self._ids.trace, self._ids.span = int(attempt["trace"], 16), int(attempt["span"], 16)
        own = self._tracer.start_span(
            "process",
            context=parent or Context(),
            kind=SpanKind.CONSUMER,
            start_time=_time(attempt["began"]),
            attributes={
                "messaging.system": "smallcat",
                "messaging.operation.type": "process",
                "smallcat.job.id": _encodable(attempt["job"]),
                **_named(attempt["attributes"]),
            },
        )
        if not own.is_recording():
            return
        inside = trace.set_span_in_context(own, Context())
        if attempt["queued"] is not None:
            self._add("queue", parent or inside, attempt["queued"], attempt["began"], {}, [])
        for name, began, ended, attributes, links in attempt["stages"]:
            self._add(name, inside, began, ended, attributes, links)
        if attempt["error"]:
            name, text = attempt["error"]
            own.set_attribute("error.type", name)
            own.set_status(Status(StatusCode.ERROR, _encodable(f"{name}: {text}")))
        own.end(_time(attempt["ended"]))

    def end(self) -> None:
        """Send what there is."""
        self._provider.shutdown()

    def _add(
        self,
        name: str,
        where: Context,
        began: int,
        ended: int,
        attributes: Mapping[str, Any],
        links: Sequence[Sequence[str]],
    ) -> None:
        self._tracer.start_span(
            name,
            context=where,
            start_time=_time(began),
            attributes=_named(attributes),
            links=[Link(span_context(TraceContext(link[0], link[1]))) for link in links],
        ).end(_time(ended))


def _time(unix_ns: int) -> int:
    """Nanoseconds that a span can have."""
    return min(max(int(unix_ns), 0), _MAX_INT)


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"smallcat.{name}": _encodable(value) for name, value in attributes.items()}


def _encodable(value: Any) -> Any:
    """A value that a span can have: halves of characters are escaped, and huge integers are text."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return f"{value:#x}" if isinstance(value, int) and abs(value) > _MAX_INT else value
