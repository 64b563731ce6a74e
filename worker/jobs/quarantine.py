"""A job that may kill its worker runs alone; all others run together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from worker.contract.errors import EngineStoppedError


class Quarantine:
    """Lets jobs run at the same time, or one alone, as a lock for readers and writers does. Thread-safe.

    A job whose earlier attempts ended with the death of their worker makes its last attempt alone
    (`RetryPolicy.runs_alone`): if it kills this worker too, no other job loses an attempt. A job that waits
    to run alone is next: no other one starts meanwhile.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting_alone = 0
        self._is_alone = False
        self._stopped = False

    def stop(self) -> None:
        """Let no job start any more: those that wait get `EngineStoppedError`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @contextmanager
    def admit(self, *, alone: bool) -> Iterator[None]:
        """Wait until the job may run; it runs for the length of a with block. Raises `EngineStoppedError`."""
        with self._changed:
            if alone:
                self._waiting_alone += 1
            try:
                self._changed.wait_for(lambda: self._stopped or self._may_start(alone))
                if self._stopped:
                    raise EngineStoppedError("The worker is stopping: the job goes back to the queue.")
            finally:
                if alone:
                    self._waiting_alone -= 1
                self._changed.notify_all()
            self._running += 1
            self._is_alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._is_alone = False
                self._changed.notify_all()

    def _may_start(self, alone: bool) -> bool:
        return not self._running if alone else not (self._is_alone or self._waiting_alone)
