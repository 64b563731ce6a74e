"""Who may be on board together: everybody, except that a job suspected of killing workers is alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from worker.contract.errors import EngineStoppedError


class Quarantine:
    """Shared and exclusive places on one machine. Thread-safe.

    A job whose earlier attempts ended with the death of their worker has its last attempt alone: if it
    kills this one too, none of its mates is counted down with it. Who waits to be alone is next: nobody
    new comes on board meanwhile.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._on_board = 0
        self._waiting = 0
        self._alone = False
        self._stopped = False

    def stop(self) -> None:
        """Let nobody on board any more: who waits gets `EngineStoppedError`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @contextmanager
    def place(self, *, alone: bool) -> Iterator[None]:
        """Be on board for the length of a with block. Raises `EngineStoppedError` after `stop`."""
        with self._changed:
            if alone:
                self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._stopped or self._is_free(alone))
                if self._stopped:
                    raise EngineStoppedError("The worker is stopping: the job goes back to the queue.")
            finally:
                if alone:
                    self._waiting -= 1
                self._changed.notify_all()
            self._on_board += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._on_board -= 1
                self._alone = False
                self._changed.notify_all()

    def _is_free(self, alone: bool) -> bool:
        return not self._on_board if alone else not (self._alone or self._waiting)
