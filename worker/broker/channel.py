"""The consuming side of the transport: kombu's Redis channel with an atomic fetch.

`worker.broker.fetching` has the fetch, `worker.broker.lease` what becomes of a message after it.
"""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty
from typing import Any

import redis
from kombu.transport import redis as stock

from worker.broker.bindings import OwnNames
from worker.broker.fetching import AGAIN, Fetching, Stage
from worker.broker.job_message import MALFORMED, UNREGISTERED, log_parked, log_set_aside, read_message
from worker.broker.lease import Held, Lease
from worker.broker.leases import lease_of_process
from worker.broker.poller import Poller
from worker.broker.qos import QoS
from worker.broker.scripts import FETCH
from worker.broker.transport import LEASE_S, open_slots, open_steps
from worker.contract.errors import NewerMessageError

logger = logging.getLogger("smallcat.transport")


class Channel(Fetching, OwnNames):
    """kombu's Redis channel; what it fetches is in a queue or registered as held at every instant."""

    QoS = QoS
    #: How a message is read, as `read_message`.
    reader: Any = staticmethod(read_message)
    from_transport_options: Any = (*stock.Channel.from_transport_options, "reader")
    visibility_timeout: Any = LEASE_S
    unacked_restore_interval = 2
    unacked_restore_limit: Any = 1000

    #: Whether messages are consumed that have to be acknowledged.
    acknowledging = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lost = False
        self._receivers: dict[str, tuple[bool, Callable[[Any], Any]]] = {}
        self._lease: Lease | None = None
        super().__init__(*args, **kwargs)
        # kombu has asked whether Redis is there; only a channel that consumes uses that connection again.
        self.async_pool.disconnect(inuse_connections=False)

    # Consumers.

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> Any:
        """Consume from a queue; messages of one with `no_ack` are gone once fetched, as with kombu."""
        result = super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        self._leave_rooms()
        self.pool.disconnect(inuse_connections=False)  # It has declared the queues, and publishes little.
        if queue not in self.active_fanout_queues:
            self._receivers[queue] = (bool(no_ack), callback)
        if not no_ack:
            self.acknowledging = True
            self.lease.attach(self)
        return result

    def _basic_cancel(self, consumer_tag: str) -> Any:
        self._receivers.pop(self._tag_to_queue.get(consumer_tag, ""), None)
        result = super()._basic_cancel(consumer_tag)
        if self._in_poll and not self.active_queues:
            # Nothing reads this connection any more; a message on its way would wait until its lease ends.
            with suppress(*self.connection_errors):
                while self._stage is not Stage.IDLE:
                    with suppress(Empty):
                        self._brpop_read()
        self._leave_rooms()
        return result

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Fetch one message now, or None."""
        lists = self._lists_at([queue], self.priority_steps)
        self.acknowledging = self.acknowledging or not no_ack
        with self._plain_client() as client:
            while reply := client.eval(FETCH, *self._fetch_command(lists, no_ack=no_ack)):
                if reply == [AGAIN]:
                    continue
                index, raw, tag = reply
                message = self._read_message(lists[index][0], raw, tag)
                if message is not None:
                    return message
        return None

    def close(self) -> None:
        """Close in order: give everything back. After `lose` everything stays with the process."""
        if not self.closed and not self._lost:
            for consumer_tag in list(self._consumers):
                self._basic_cancel(consumer_tag)
        self._in_poll = None
        try:
            super().close()
        finally:
            if self._lease is not None:
                self._lease.detach(self)

    def lose(self) -> None:
        """The connection is lost; its messages belong to the process now, and their jobs run on."""
        self._lost = True
        self._in_poll = None
        self._stage = Stage.IDLE
        self.auto_delete_queues.clear()  # Closing would delete them over this connection.
        if self.acknowledging:
            self.acknowledging = False
            self.lease.orphan(self.qos)

    @property
    def lease(self) -> Lease:
        """The messages that this process holds from the Redis of this channel; outlives the channel."""
        if self._lease is None:
            broker = self.connection.client
            keys = (self.layout.unacked, self.layout.index)
            name = (broker.hostname, broker.port, broker.virtual_host, *keys)
            self._lease = lease_of_process(name, self._new_lease)
        return self._lease

    def _new_pool(self, params: dict[str, Any]) -> Any:
        return redis.ConnectionPool(**params)

    def _get_pool(self, asynchronous: bool = False) -> Any:
        params = self._connparams(asynchronous=asynchronous)
        self.keyprefix_fanout = self.keyprefix_fanout.format(db=params["db"])
        return self._new_pool(params)

    def _new_lease(self) -> Lease:
        params = self._connparams()
        # An answer that comes after the next renewal is of no use.
        limits = (self.visibility_timeout / 4, self.socket_timeout)
        params["socket_timeout"] = min(limit for limit in limits if limit)
        pool = self._new_pool(params)  # Not by the lease's thread: it outlives this channel.
        return Lease(
            lambda: redis.Redis(connection_pool=pool),
            self.layout,
            timeout_s=self.visibility_timeout,
            sweep_every_s=self.unacked_restore_interval,
            sweep_limit=self.unacked_restore_limit,
        )

    def _connparams(self, asynchronous: bool = False) -> Any:
        params = super()._connparams(asynchronous=asynchronous)
        if asynchronous:
            params["protocol"] = 3  # In it Redis may send notices that answer no command.
        return params

    def _open_steps(self) -> Sequence[int]:
        """The priorities that may be fetched: the last slots are reserved for urgent messages."""
        return open_steps(self.priority_steps, self.lease.count if self.acknowledging else 0)

    def _open_slots(self) -> int:
        """Those of the process that are free for messages of `_open_steps`; 1 where nothing is held."""
        limit = self.qos.prefetch_count if self.acknowledging else 0
        return max(1, open_slots(limit, self.lease.count)) if limit else 1

    def _may_have_messages(self, parked_list: str) -> bool:
        """As the lease's thread has seen: most of the time there are none, and a fetch names fewer lists."""
        return not self.acknowledging or self.lease.parked is None or parked_list in self.lease.parked

    # Delivering.

    def _read_message(self, queue: str, raw: bytes, tag: bytes | None) -> Any:
        """Decode a fetched message and hold it, or set it aside and return None."""
        if tag:
            self.lease.hold(tag.decode(), Held(self.qos, raw, queue))
        if tag is None:  # The fetch has set it aside.
            log_set_aside(queue, self.layout, UNREGISTERED)
            return None
        try:
            return self.reader(raw, queue, tag.decode(), self)
        except NewerMessageError as error:
            if tag:
                self.lease.park(tag.decode(), error.version)
            log_parked(self.layout, error)
        except Exception as error:  # noqa: BLE001 -- whatever is wrong is wrong with the message
            self._set_aside(queue, tag, error)
        return None

    def _receive_messages(self, queue: str, found: Sequence[tuple[bytes, bytes | None]]) -> None:
        raised: list[BaseException] = []
        for raw, tag in found:
            try:
                self._receive_message(queue, raw, tag)
            except BaseException as error:  # noqa: BLE001 -- the others are held by this process, too
                raised.append(error)
        if raised:
            raise raised[0]

    def _receive_message(self, queue: str, raw: bytes, tag: bytes | None) -> None:
        message = self._read_message(queue, raw, tag)
        if message is None:
            return
        no_ack, callback = self._receivers.get(queue, (False, None))
        if callback is None:  # Cancelled while the fetch was on its way.
            if tag:
                self.lease.requeue(tag.decode(), first=True)
            return
        try:
            callback(message)
        except MALFORMED as error:
            if no_ack:
                raise
            self._set_aside(queue, tag, error)
        except BaseException:
            # It never reached the pool.
            if tag:
                self.lease.requeue(tag.decode(), first=True, counts=True)
            raise

    def _set_aside(self, queue: str, tag: bytes | None, error: Exception) -> None:
        if tag:
            self.lease.set_aside(tag.decode(), str(error) or type(error).__name__)
        log_set_aside(queue, self.layout, error)


class Transport(stock.Transport):
    """kombu's Redis transport with the channel of this module."""

    Channel = Channel
    cycle: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def _collect(self, connection: Any) -> None:
        """Drop a lost connection; kombu and Celery call it then, and `close_connection` otherwise."""
        for channel in (*self.channels, *self._avail_channels):
            channel.lose()
        self.close_connection(connection)


class TLSTransport(Transport):
    """The same over TLS: the server's certificate is verified unless `ssl_cert_reqs` says otherwise."""

    def __init__(self, client: Any, **kwargs: Any) -> None:
        if not isinstance(client.ssl, dict):
            client.ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
        super().__init__(client, **kwargs)
