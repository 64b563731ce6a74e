"""Spans of those who submit jobs, take requests or notify: made in their own process.

An application that traces itself has its tracer provider used, and its current span is the parent. Otherwise
OpenTelemetry's variables say whether anything is traced: without an endpoint nothing of it is imported.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from worker.contract.plain_text import plain
from worker.tracing.context import TraceContext, endpoint_of, shown, why_not

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanKind, Tracer

logger = logging.getLogger("smallcat.tracing")

_SCOPE: Final = "smallcat"
_lock = threading.Lock()
#: The tracer of this process' own, by where it sends to; None: it cannot be had.
_own: dict[str, Tracer | None] = {}
#: What this process calls itself where nobody says.
_service = "smallcat-producer"


class SentSpan:
    """A span that other processes' spans are to be below."""

    def __init__(self, span: Span | None = None) -> None:
        self._span = span
        #: Where it is; None: nothing is traced.
        self.context: TraceContext | None = None
        if span is not None and (found := span.get_span_context()).is_valid:
            state = found.trace_state.to_header()
            self.context = TraceContext(
                f"{found.trace_id:032x}", f"{found.span_id:016x}", found.trace_flags.sampled, state
            )

    @property
    def headers(self) -> dict[str, str]:
        """For the message of a job; empty: nothing is traced."""
        return self.context.headers if self.context else {}

    @property
    def trace(self) -> str:
        """Id of its trace, for the log; empty where it is not recorded."""
        return self.context.trace if self.context and self.context.is_sampled else ""

    def on(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message of a job with the headers."""
        if self.context:
            message["headers"] = message["headers"] | self.headers
        return message

    def on_hook(self, hook: str) -> str:
        """What Redis keeps of a webhook (`worker.contract.webhook.hook_of`), with the headers."""
        return json.dumps(json.loads(hook) | self.headers) if hook and self.context else hook

    def note(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def rename(self, name: str) -> None:
        """Give it another name."""
        if self._span is not None:
            self._span.update_name(name)

    def fail(self, what: BaseException | str) -> None:
        """Say that it has failed."""
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            # OpenTelemetry's name for an error without a class.
            name = "_OTHER" if isinstance(what, str) else type(what).__name__
            self._span.set_attribute("error.type", name)
            self._span.set_status(Status(StatusCode.ERROR, plain(str(what).partition("\n")[0])))

    def end(self) -> None:
        """The span is over."""
        if self._span is not None:
            self._span.end()


NO_SPAN: Final = SentSpan()


def service_is(name: str) -> None:
    """Say what this process calls itself, where OpenTelemetry's variables do not."""
    global _service
    _service = name


def tracer() -> Tracer | None:
    """What makes spans here; None: nothing is traced."""
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
        if not isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
            return provider.get_tracer(_SCOPE)
    if not (endpoint := endpoint_of(os.environ)):
        return None
    with _lock:
        if endpoint not in _own:
            _own[endpoint] = _made(endpoint)
        return _own[endpoint]


def _made(endpoint: str) -> Tracer | None:
    if why := why_not(os.environ):
        logger.warning("Nothing is traced to %s: %s.", shown(endpoint), why)
        return None
    from worker.tracing.spans import provider_of

    return provider_of(_service).get_tracer(_SCOPE)


def send_span(job_id: str, queue: str, *, is_root: bool = False) -> SentSpan:
    """The submission of a job, begun: below the current span, or with `is_root` of a trace of its own."""
    if (made := tracer()) is None:
        return NO_SPAN
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind

    attributes = {
        "messaging.system": "smallcat",
        "messaging.operation.type": "send",
        "messaging.destination.name": queue,
        "smallcat.job.id": job_id,
    }
    where = Context() if is_root else None
    return SentSpan(made.start_span("submit", where, SpanKind.PRODUCER, attributes))


@contextlib.contextmanager
def sending(job_id: str, queue: str) -> Iterator[SentSpan]:
    """As `send_span`, for the length of a with block."""
    sent = send_span(job_id, queue)
    try:
        yield sent
    except BaseException as error:
        sent.fail(error)
        raise
    finally:
        sent.end()


@contextlib.contextmanager
def request_span(name: str, headers: Mapping[str, str], attributes: Mapping[str, Any]) -> Iterator[SentSpan]:
    """A request that this process answers, which is the current span: below that of whoever sent it."""
    if tracer() is None:
        yield NO_SPAN
        return
    from opentelemetry.trace import SpanKind

    parent = TraceContext.parse(headers.get("traceparent"), headers.get("tracestate"))
    with _below(name, parent, attributes, SpanKind.SERVER) as span:
        yield span


@contextlib.contextmanager
def notification_span(hook: Mapping[str, Any], attributes: Mapping[str, Any]) -> Iterator[SentSpan]:
    """An attempt to notify a webhook, below the submission of its job. Of other webhooks there is none."""
    parent = TraceContext.parse(hook.get("traceparent"), hook.get("tracestate"))
    if parent is None or not parent.is_sampled or tracer() is None:
        yield NO_SPAN
        return
    from opentelemetry.trace import SpanKind

    with _below("webhook", parent, attributes, SpanKind.CLIENT) as span:
        yield span


@contextlib.contextmanager
def _below(
    name: str, parent: TraceContext | None, attributes: Mapping[str, Any], kind: SpanKind
) -> Iterator[SentSpan]:
    made = tracer()
    assert made is not None  # noqa: S101 - the callers have looked
    from opentelemetry import trace

    from worker.tracing.parents import below

    where = below(parent) if parent else None
    span = made.start_span(name, where, kind, dict(attributes))
    sent = SentSpan(span)
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield sent
        except BaseException as error:
            sent.fail(error)
            raise
