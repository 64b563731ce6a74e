"""Celery's task events, which Flower and `celery events` read, sent in batches.

Celery sends the events of every turn of its loop in a message of their own. For small jobs that takes a fifth
of the worker's Python time, and delays the next fetch.
"""

# mypy: disallow-subclassing-any=False
# Celery's steps are not typed.

from __future__ import annotations

from typing import Any, Final

from celery.bootsteps import StartStopStep
from celery.worker.consumer.events import Events

#: Seconds between two batches.
EVERY_S: Final = 0.5


class EventBatches(StartStopStep):
    """Sends task events twice a second. Starts again with each connection of the consumer."""

    requires = (Events,)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._entry: Any = None

    def start(self, consumer: Any) -> None:
        """Replace Celery's own flushes."""
        dispatcher = consumer.event_dispatcher
        dispatcher.on_send_buffered = None
        # Otherwise a thread of the pool sends a full buffer, and its job waits for Redis.
        dispatcher.buffer_limit = float("inf")
        self._entry = consumer.timer.call_repeatedly(EVERY_S, dispatcher.flush)

    def stop(self, consumer: Any) -> None:
        """Stop; the next connection has a dispatcher of its own."""
        if self._entry is not None:
            self._entry.cancel()
            self._entry = None
