"""The consuming side of the transport: kombu's Redis channel with an atomic fetch.

kombu pops a message and then registers it: a worker that is killed in between has lost it. Here one script
does both. When all lists are empty, the connection waits until Redis reports that one of them changed (CLIENT
TRACKING, which pops nothing and watches any number of lists), then fetches again. All of it goes over kombu's
own polled connection, in the place of its BRPOP, so that the event loop never waits for Redis:

    READY --fetch--> FETCHING --message--> READY
                        |
                      empty --exists?--> CHECKING --none--> WAITING --changed, or a second later--> READY
"""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import enum
import functools
import logging
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty
from time import monotonic
from typing import Any, Final

import redis.exceptions
from kombu.transport import redis as stock

from worker.broker.bindings import OwnNames
from worker.broker.job_message import MALFORMED, UNREGISTERED, log_parked, log_set_aside, read_message
from worker.broker.layout import Layout, json_name
from worker.broker.lease import Held, Lease, lease_of_process
from worker.broker.moves import KEPT_BYTES
from worker.broker.poller import CHECK_AGAIN_S, Poller
from worker.broker.qos import QoS
from worker.broker.replicated import ReplicatedPuts
from worker.broker.scripts import FETCH
from worker.broker.transport import (
    LEASE_S,
    UNACKED,
    UNACKED_INDEX,
    UNDECODABLE_MAX,
    UNDECODABLE_TTL_S,
    open_steps,
)
from worker.contract.errors import NewerMessageError
from worker.contract.job import FORMAT_VERSION
from worker.contract.queues import PARKED, UNDECODABLE, list_of, parked_list_of
from worker.contract.refusals import refusal_log

logger = logging.getLogger("smallcat.transport")

#: Bytes of a message that is read at all, whatever its version: room for what later versions send.
MAX_READ: Final = 1_000_000

#: Result of reading from the consuming connection when Redis reports that a list changed.
CHANGED: Final = object()


class Stage(enum.Enum):
    """What the consuming connection is doing."""

    READY = enum.auto()
    FETCHING = enum.auto()
    CHECKING = enum.auto()
    WAITING = enum.auto()


class Channel(ReplicatedPuts, OwnNames):
    """kombu's Redis channel; what it fetches is in a queue or registered as held at every instant."""

    QoS = QoS
    #: How a message is read, as `read_message`.
    reader: Any = staticmethod(read_message)
    from_transport_options: Any = (*stock.Channel.from_transport_options, "reader")
    visibility_timeout: Any = LEASE_S
    unacked_restore_interval = 2
    unacked_restore_limit: Any = 1000
    _in_poll: Any = None
    _brpop_sent_at: Any = None

    #: Whether messages are consumed that have to be acknowledged.
    acknowledging = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lost = False
        self._stage = Stage.READY
        self._wake_at = 0.0
        self._lists: list[tuple[str, str]] = []
        self._steps: Sequence[int] = ()
        self._receivers: dict[str, tuple[bool, Callable[[Any], Any]]] = {}
        self._lease: Lease | None = None
        super().__init__(*args, **kwargs)

    # Consumers.

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> Any:
        """Consume from a queue; messages of one with `no_ack` are gone once fetched, as with kombu."""
        result = super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        if queue not in self.active_fanout_queues:
            self._receivers[queue] = (bool(no_ack), callback)
        if not no_ack:
            self.acknowledging = True
            self.lease.attach(self)
        return result

    def _basic_cancel(self, consumer_tag: str) -> Any:
        self._receivers.pop(self._tag_to_queue.get(consumer_tag, ""), None)
        result = super()._basic_cancel(consumer_tag)
        if self._stage is Stage.FETCHING and self._in_poll and not self.active_queues:
            # Nothing reads this connection any more; a message on its way would wait until its lease ends.
            with suppress(*self.connection_errors):
                while self._stage is Stage.FETCHING:
                    with suppress(Empty):
                        self._brpop_read()
        return result

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Fetch one message now, or None."""
        lists = [each for step in self.priority_steps for each in self._at(queue, step)]
        self.acknowledging = self.acknowledging or not no_ack
        with self._plain_client() as client:
            while reply := client.execute_command(*self._fetch_command(lists, no_ack=no_ack)):
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
        self._stage = Stage.READY
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

    @functools.cached_property
    def layout(self) -> Layout:
        """The keys of this channel's messages."""
        prefix = self.global_keyprefix
        return Layout(
            unacked=prefix + UNACKED,
            index=prefix + UNACKED_INDEX,
            undecodable=prefix + UNDECODABLE,
            parked=prefix + PARKED,
            prefix=prefix,
            priority_steps=tuple(self.priority_steps),
        )

    # Fetching.

    def _connparams(self, asynchronous: bool = False) -> Any:
        params = super()._connparams(asynchronous=asynchronous)
        if asynchronous:
            params["protocol"] = 3  # In it Redis may send notices that answer no command.
        return params

    def track(self) -> None:
        """Ask Redis to report on this new connection when a list that was found empty changes."""
        connection = self.client.connection
        connection._parser.set_invalidation_push_handler(lambda _: CHANGED)
        connection.send_command("CLIENT", "TRACKING", "ON", "NOLOOP", check_health=False)
        try:
            connection.read_response()
        except redis.exceptions.ResponseError as error:
            logger.warning("Redis refuses CLIENT TRACKING (%s): idle workers fetch once a second", error)

    def fetch_if_due(self) -> None:
        """Send the next fetch, unless one is on its way or all lists are known to be empty."""
        if self._stage is Stage.READY or (self._stage is Stage.WAITING and self._may_fetch_again()):
            self._brpop_start()

    def _may_fetch_again(self) -> bool:
        """Whether the answer that all lists are empty is old, or was about other lists than today's."""
        return monotonic() >= self._wake_at or self._steps != self._open_steps()

    def _open_steps(self) -> Sequence[int]:
        """The priorities that may be fetched: the last slots are reserved for urgent messages."""
        return open_steps(self.priority_steps, self.lease.count if self.acknowledging else 0)

    def _brpop_start(self, timeout: float | None = None) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        self._steps = self._open_steps()
        # Priority before queue: the most urgent message of all queues is next.
        self._lists = [each for step in self._steps for queue in queues for each in self._at(queue, step)]
        # Stays set: kombu drops a connection that is readable without it.
        self._in_poll = self.client.connection
        self._send(Stage.FETCHING, *self._fetch_command(self._lists))

    def _fetch_command(self, lists: list[tuple[str, str]], no_ack: bool = False) -> tuple[Any, ...]:
        keys = [self.layout.unacked, self.layout.index, self.layout.undecodable]
        keys += [key for _, key in lists]
        unacknowledged = {queue for queue, (no_ack_queue, _) in self._receivers.items() if no_ack_queue}
        names = ["" if no_ack or queue in unacknowledged else json_name(queue) for queue, _ in lists]
        limits = (MAX_READ, UNDECODABLE_TTL_S, UNDECODABLE_MAX, KEPT_BYTES, UNREGISTERED)
        return ("EVAL", FETCH, len(keys), *keys, *limits, *names)

    def _at(self, queue: str, priority: int) -> list[tuple[str, str]]:
        """Where messages of a priority wait: first those that older workers put aside for this version."""
        names = [parked_list_of(queue, priority, version) for version in range(2, FORMAT_VERSION + 1)]
        return [(queue, f"{self.global_keyprefix}{name}") for name in (*names, list_of(queue, priority))]

    def _plain_client(self) -> Any:
        """A client that leaves keys alone: here they are complete."""
        return redis.Redis(connection_pool=self.pool)

    def _send(self, stage: Stage, *command: Any) -> None:
        self._stage = stage
        self._brpop_sent_at = monotonic()
        # A health check would wait for its answer. kombu's own drops the connection when this answer is late.
        self.client.connection.send_command(*command, check_health=False)

    def _pause(self, stage: Stage) -> None:
        self._stage = stage
        self._brpop_sent_at = None
        self._wake_at = monotonic() + CHECK_AGAIN_S

    def _brpop_read(self, **options: Any) -> bool:
        """Read all that has arrived. Raises `Empty` when there was no message in it."""
        connection = self.client.connection
        delivered = False
        try:
            while True:
                try:
                    reply = connection.read_response(disable_decoding=True, push_request=True)
                except redis.exceptions.ReadOnlyError as error:
                    # The primary has become a replica: the next connection finds the new primary.
                    refusal_log.refused("fetch", error)
                    raise redis.exceptions.ConnectionError(str(error)) from error
                except redis.exceptions.ResponseError as error:
                    refusal_log.refused("fetch", error)
                    self._pause(Stage.WAITING)
                else:
                    delivered |= self._advance(reply)
                # Data that the parser has read ahead does not make the socket readable again.
                if connection._sock is None or not connection.can_read(timeout=0):
                    break
        except redis.exceptions.ConnectionError:
            connection.disconnect()
            raise
        if not delivered:
            raise Empty
        return True

    def _advance(self, reply: Any) -> bool:
        """Go to the next stage after a reply. Returns whether it was a message."""
        if reply is CHANGED:
            if self._stage is Stage.WAITING:
                self._stage = Stage.READY
        elif reply is None:
            pass  # Another notice of Redis, such as that it is about to move.
        elif self._stage is Stage.CHECKING:
            self._pause(Stage.READY if reply else Stage.WAITING)
        elif self._stage is Stage.FETCHING and reply:
            refusal_log.answered("fetch")
            self._pause(Stage.READY)
            index, raw, tag = reply
            queue = self._lists[index][0]
            self._queue_cycle.rotate(queue)
            self._receive_message(queue, raw, tag)
            return True
        elif self._stage is Stage.FETCHING:
            refusal_log.answered("fetch")
            self._send(Stage.CHECKING, "EXISTS", *(key for _, key in self._lists))
        return False

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
