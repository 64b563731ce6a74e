"""Whose requests wait for which jobs, in this server process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from producer.client import JobHandle
from producer.http.caller import Caller


class Waiting:
    """The jobs of waiting requests of one server, by their callers: for progress, and to interrupt them."""

    def __init__(self) -> None:
        self._handles: dict[str, list[JobHandle]] = {}

    @contextlib.contextmanager
    def noted(self, caller: Caller, handles: Sequence[JobHandle]) -> Iterator[None]:
        """Within this, the jobs are among the caller's."""
        mine = self._handles.setdefault(caller.mark, [])
        mine += handles
        try:
            yield
        finally:
            for each in handles:
                mine.remove(each)
            if not mine:
                self._handles.pop(caller.mark, None)

    def of(self, caller: Caller) -> list[JobHandle]:
        """The jobs that a caller waits for."""
        return list(self._handles.get(caller.mark, ()))
