"""What Flower and `celery events` hear of a worker's jobs, in groups.

Celery sends the events of every turn of its loop in a message of their own: a fifth of all Python that a
worker runs for small jobs, and in the way of the next fetch.
"""

# mypy: disallow-subclassing-any=False
# Celery's steps are not typed.

from __future__ import annotations

from typing import Any, Final

from celery.bootsteps import StartStopStep
from celery.worker.consumer.events import Events

#: Seconds between two groups of events.
EVERY_S: Final = 0.5


class EventGroups(StartStopStep):
    """Sends what happened to jobs twice a second. Begins anew with each connection of the consumer."""

    requires = (Events,)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._entry: Any = None

    def start(self, consumer: Any) -> None:
        """Take the place of Celery's own flushes."""
        dispatcher = consumer.event_dispatcher
        dispatcher.on_send_buffered = None
        # A thread of the pool would send a full buffer, and wait for Redis with a job in its hands.
        dispatcher.buffer_limit = float("inf")
        self._entry = consumer.timer.call_repeatedly(EVERY_S, dispatcher.flush)

    def stop(self, consumer: Any) -> None:
        """The next connection has a dispatcher of its own."""
        if self._entry is not None:
            self._entry.cancel()
            self._entry = None
