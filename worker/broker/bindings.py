"""Routing without tables in Redis, and names of our own for what kombu shares.

kombu keeps a table of bindings for each exchange, under the same keys for all applications of a database.
What Celery uses needs none: a task goes to the queue that it names, a broadcast over publish/subscribe, and
the answer to it into the list whose name follows from its address.
"""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import re
from typing import Any, Final

from kombu.transport import redis as stock

from worker.broker.layout import BINDINGS
from worker.broker.transport import UNACKED, UNACKED_INDEX
from worker.contract.refusals import code_of

#: The exchange of answers to `celery inspect`, as `kombu.pidbox.Mailbox` names it.
_ANSWERS: Final = re.compile(r"reply\..+\.pidbox")


class OwnNames(stock.Channel):
    """kombu's Redis channel with keys of our own, and with bindings only where an exchange needs them."""

    unacked_key = UNACKED
    unacked_index_key = UNACKED_INDEX
    unacked_mutex_key = "smallcat:unacked_mutex"
    keyprefix_queue = f"{BINDINGS}:%s"
    keyprefix_binding_permanent = f"{BINDINGS}_permanent:%s"
    keyprefix_binding_deadlines = f"{BINDINGS}_deadlines"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Queues with a binding in Redis.
        self._bound: set[str] = set()
        super().__init__(*args, **kwargs)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        if self.typeof(exchange).type == "fanout":
            self._fanout_queues[queue] = exchange, routing_key.replace("#", "*")
            return
        if _queue_of(exchange, routing_key) == queue:
            return
        self._bound.add(queue)
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except Exception as error:
            if code_of(error) is None:
                raise
            # Consuming needs no binding, and makes room in a Redis that is full. Others log the refusal.

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> Any:
        queue = _queue_of(exchange, routing_key)
        return super()._lookup(exchange, routing_key, default) if queue is None else [queue]

    def maybe_refresh_binding_expiry(self) -> None:
        """Refresh what is in Redis, if anything is."""
        if not self._bound.isdisjoint(self._active_queues):
            super().maybe_refresh_binding_expiry()


def _queue_of(exchange: str, routing_key: str) -> str | None:
    """The queue that a message goes to whatever is bound; None where the bindings say it."""
    if exchange == routing_key:
        return routing_key  # Celery's exchange of a queue, which has its name.
    if _ANSWERS.fullmatch(exchange or ""):
        return f"{routing_key}.{exchange}"
    return None
