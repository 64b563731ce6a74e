"""Whether a channel may fetch, and how its messages are acknowledged, rejected and given back."""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import logging
from typing import Any

from kombu.transport import redis as stock

from worker.broker.lease import FLUSH_S, Held
from worker.broker.transport import alive, open_slots, paused

logger = logging.getLogger("smallcat.transport")


class QoS(stock.QoS):
    """kombu's quality of service of a channel, on top of the process' lease, which outlives the channel."""

    def can_consume(self) -> bool:
        """Whether one more message may be fetched: all that the process holds count, of any channel."""
        if not self.channel.acknowledging:
            return True
        limit = self.prefetch_count
        return alive() and not paused() and (not limit or open_slots(limit, self.channel.lease.count) > 0)

    def append(self, message: Any, delivery_tag: str) -> None:
        """Hold a broadcast: it came over publish/subscribe and is not registered in Redis."""
        self.channel.lease.hold(delivery_tag, Held(self, None, ""))

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge, even long after the connection that delivered the message was lost."""
        self.channel.lease.acknowledge(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop the message, or give it back behind all others of its priority."""
        if requeue:
            self.channel.lease.requeue(delivery_tag, first=False)
        else:
            self.channel.lease.acknowledge(delivery_tag)

    def restore_unacked(self, client: Any = None) -> None:
        """Give back the messages that the process holds, and wait until Redis has answered."""
        returned = self.channel.lease.give_back(self)
        if returned:
            logger.info("Gave %d unfinished messages back to their queues", returned)
        self.channel.lease.flush(FLUSH_S)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Give back when the channel is closed or the process ends; not when the connection is lost."""
        self._on_collect.cancel()
        if self.channel.acknowledging:
            self.restore_unacked()

    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None:
        """Nothing: the lease's thread does it."""
