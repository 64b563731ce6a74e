"""Spans of other processes as parents and as links, in OpenTelemetry's own types, by its API alone."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.span import TraceState

from worker.tracing.context import TraceContext


def span_context(context: TraceContext) -> SpanContext:
    """As OpenTelemetry has it."""
    flags = TraceFlags(TraceFlags.SAMPLED if context.is_sampled else TraceFlags.DEFAULT)
    state = TraceState.from_header([context.state]) if context.state else None
    return SpanContext(int(context.trace, 16), int(context.span, 16), True, flags, state)


def below(context: TraceContext) -> Context:
    """Where a span is below another process' span."""
    return trace.set_span_in_context(NonRecordingSpan(span_context(context)), Context())
