"""Which job the running code is about: lines of the log say it, whoever writes them.

A job is worked on by one thread from its claim to its end, and each thread has a scope of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class JobScope(NamedTuple):
    """A job, and the trace that it is part of."""

    #: Its id; empty: the code is about no job.
    job: str = ""
    #: The trace's id, 32 hexadecimal digits; empty: it is part of none.
    trace: str = ""


_NONE = JobScope()
_scope: ContextVar[JobScope] = ContextVar("smallcat job", default=_NONE)


def job_scope() -> JobScope:
    """The job that this thread, or this asyncio task, works on."""
    return _scope.get()


@contextmanager
def about_job(job: str, trace: str = "") -> Iterator[None]:
    """For the length of a with block this thread works on that job."""
    token = _scope.set(JobScope(job, trace))
    try:
        yield
    finally:
        _scope.reset(token)
