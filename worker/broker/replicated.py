"""A message that counts as sent only when replicas of Redis have it."""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

from typing import Any

from kombu.transport import redis as stock
from kombu.utils.json import dumps

from worker.contract.errors import QueueError
from worker.contract.refusals import too_few_replicas


class ReplicatedPuts(stock.Channel):
    """kombu's channel, whose pushes wait for replicas where its transport options ask for it."""

    #: Replicas that confirm a message, and seconds that they have for it.
    wait_replicas = 0
    wait_s = 0.0
    from_transport_options: Any = (*stock.Channel.from_transport_options, "wait_replicas", "wait_s")

    def put(self, queue: str, message: Any) -> None:
        """Send a message that was made before."""
        self._put(queue, message)

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        """Push, and wait over the same connection: another may lead to another primary."""
        if not self.wait_replicas or kwargs.get("_publish_batch") is not None:
            super()._put(queue, message, **kwargs)
            return
        key = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            pipe.lpush(key, dumps(message))
            pipe.wait(self.wait_replicas, max(1, int(1_000 * self.wait_s)))
            have_it = int(pipe.execute()[-1])
        if have_it < self.wait_replicas:
            # Perhaps it is no primary any more: the next try asks the sentinels.
            self.pool.disconnect(inuse_connections=False)
            raise QueueError(too_few_replicas(have_it, self.wait_replicas))
