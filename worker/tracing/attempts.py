"""A worker's part of a trace: what an attempt at a job consists of, noted while it goes on.

The thread that works on a job notes the times, and hands them to another process when the attempt is over
(`worker.tracing.exporter`): making and sending spans takes a millisecond of Python a job, which would be
missing where the GPU is fed. OpenTelemetry is not imported here.

Where nothing is traced, and for jobs that are not sampled, each call does nothing. None of them raises:
a job goes on without its trace (`harmless`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from worker.contract.job_scope import about_job
from worker.contract.plain_text import plain
from worker.tracing.context import TraceContext

logger = logging.getLogger("smallcat.tracing")

#: Characters of an error's text that a span has, at most.
_MAX_TEXT: Final = 400

_current: ContextVar[Attempt | None] = ContextVar("smallcat attempt", default=None)
#: Whether the log has said that something here failed.
_has_told = False


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """Whatever fails in the with block is logged, once a process, and goes no further.

    What a thread raises beside a job's own errors would lose the job: Celery acknowledges its message.
    """
    global _has_told
    try:
        yield
    except Exception:
        if not _has_told:
            _has_told = True
            with contextlib.suppress(Exception):
                logger.exception(
                    "Spans of a job are lost, and the job goes on. Further ones are lost in silence."
                )


class Attempt:
    """One attempt, as the spans that it becomes: one of its own, and one for each stage."""

    def __init__(self, job_id: str, parent: TraceContext | None) -> None:
        self.job_id, self._parent = job_id, parent
        trace = parent.trace if parent else secrets.token_hex(16)
        #: Its span, for those that it shares steps with.
        self.context = TraceContext(trace, secrets.token_hex(8))
        self._began_s = time.monotonic()
        #: From monotonic seconds to Unix nanoseconds.
        self._offset_ns = time.time_ns() - round(self._began_s * 1e9)
        self._stages: list[tuple[str, int, int, dict[str, Any], list[TraceContext]]] = []
        self._attributes: dict[str, Any] = {}
        self._error: tuple[str, str] | None = None
        self._queued_s: float | None = None

    def add(
        self,
        name: str,
        began_s: float,
        ended_s: float,
        attributes: Mapping[str, Any] | None = None,
        links: Iterable[TraceContext] = (),
    ) -> None:
        """Note a stage that is over, by `time.monotonic`. `links`: attempts that it has to do with."""
        times = self._ns(began_s), self._ns(ended_s)
        self._stages.append((name, *times, dict(attributes or {}), list(links)))

    def note(self, queued_s: float | None = None, **attributes: Any) -> None:
        """Note what the attempt's own span says. `queued_s`: seconds that the job waited before it.

        A wait that cannot have been, as of a job from before 1970, is left out.
        """
        if queued_s is not None and math.isfinite(queued_s) and 0 <= queued_s <= time.time():
            self._queued_s = queued_s
        self._attributes |= attributes

    def fail(self, error: BaseException) -> None:
        """Note that the attempt has failed."""
        self._error = type(error).__name__, plain(str(error).partition("\n")[0])[:_MAX_TEXT]

    def as_json(self) -> dict[str, Any]:
        """What `worker.tracing.spans` reads."""
        now_s = time.monotonic()
        waited_s = self._queued_s
        return {
            "job": self.job_id,
            "trace": self.context.trace,
            "span": self.context.span,
            "parent": self._parent.span if self._parent else "",
            "state": self._parent.state if self._parent else "",
            "queued": None if waited_s is None else self._ns(self._began_s - waited_s),
            "began": self._ns(self._began_s),
            "ended": self._ns(now_s),
            "attributes": self._attributes,
            "error": self._error,
            "stages": [
                (*stage, [[link.trace, link.span] for link in links]) for *stage, links in self._stages
            ],
        }

    def _ns(self, monotonic_s: float) -> int:
        return round(monotonic_s * 1e9) + self._offset_ns


#: Gets each attempt that is over; None: nothing is traced.
_send: Callable[[dict[str, Any]], None] | None = None


def trace_to(send: Callable[[dict[str, Any]], None] | None) -> None:
    """From now on each attempt of this process goes to `send` when it is over."""
    global _send
    _send = send


@contextlib.contextmanager
def attempt(job_id: str, traceparent: object, tracestate: object) -> Iterator[None]:
    """For the length of a with block this thread works on a job whose message had these headers.

    The log says its trace, also where this worker traces nothing.
    """
    parent = TraceContext.parse(traceparent, tracestate)
    # Who submitted the job has decided whether it is recorded.
    if _send is None or (parent is not None and not parent.is_sampled):
        with about_job(job_id, parent.trace if parent and parent.is_sampled else ""):
            yield
        return
    made = Attempt(job_id, parent)
    token = _current.set(made)
    try:
        with about_job(job_id, made.context.trace):
            yield
    finally:
        _current.reset(token)
        with harmless():
            _send(made.as_json())


def current() -> Attempt | None:
    """The attempt that this thread makes; None: there is none, or it is not traced."""
    return _current.get()


@contextlib.contextmanager
def _noted(made: Attempt, name: str, attributes: Mapping[str, Any]) -> Iterator[None]:
    began_s = time.monotonic()
    try:
        yield
    finally:
        with harmless():
            made.add(name, began_s, time.monotonic(), attributes)


def stage(name: str, **attributes: Any) -> contextlib.AbstractContextManager[None]:
    """The with block is a stage of the attempt."""
    made = _current.get()
    return contextlib.nullcontext() if made is None else _noted(made, name, attributes)


def note(queued_s: float | None = None, **attributes: Any) -> None:
    """As `Attempt.note`, for the attempt that this thread makes."""
    if (made := _current.get()) is not None:
        with harmless():
            made.note(queued_s, **attributes)


def failed(error: BaseException) -> None:
    """As `Attempt.fail`, likewise."""
    if (made := _current.get()) is not None:
        with harmless():
            made.fail(error)
