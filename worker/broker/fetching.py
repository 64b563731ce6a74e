"""How a channel fetches: the state of the consuming connection.

kombu pops a message and then registers it: a worker that is killed in between has lost it. Here one script
does both. When all lists are empty, the connection waits until Redis reports that one of them changed (CLIENT
TRACKING, which pops nothing and watches any number of lists), or until another worker calls it, then fetches
again; `worker.broker.waiting` has who watches and who is called. All of it goes over kombu's own polled
connection, in the place of its BRPOP, so that the event loop never waits for Redis:

    IDLE --fetch--> FETCHING --message, or empty and in line--> IDLE
                       |
                     empty and watching --exists?--> CHECKING --> IDLE
"""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import enum
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty
from time import monotonic
from typing import Any, Final

import redis.exceptions
from kombu.transport import redis as stock

from worker.broker.job_message import UNREGISTERED
from worker.broker.layout import Layout, words_of
from worker.broker.moves import KEPT_BYTES
from worker.broker.poller import CHECK_AGAIN_S
from worker.broker.scripts import FETCH, FETCH_DIGEST, LEAVE
from worker.broker.transport import UNACKED, UNACKED_INDEX, UNDECODABLE_MAX, UNDECODABLE_TTL_S
from worker.broker.waiting import CALL, PLACE_MS, Room, Waiting
from worker.contract.job import FORMAT_VERSION
from worker.contract.queues import ARRIVALS, PARKED, SHARES, UNDECODABLE, WEIGHTS, arrivals_of, lists_at
from worker.contract.refusals import refusal_log

logger = logging.getLogger("smallcat.transport")

#: What `FETCH` returns when it has looked at enough, and there may be more.
AGAIN: Final = b"again"
#: Bytes of a message that is read at all, whatever its version: room for what later versions send.
MAX_READ: Final = 1_000_000
#: Seconds until empty lists are looked at again by a connection that hears of changes: a notice may be lost.
LOOK_AGAIN_S: Final = 2.0
#: What `FETCH` is told of messages that cannot be read.
LIMITS: Final = f"{MAX_READ} {UNDECODABLE_TTL_S} {UNDECODABLE_MAX} {KEPT_BYTES} {UNREGISTERED}"
#: Messages that one fetch brings, at most. A worker has no more free slots for long.
AT_ONCE: Final = 16


@functools.cache
def _warn_of(command: str, rights: str, error: str) -> None:
    """Log once in a process, not at each connection, that Redis refuses what idle workers hear by."""
    logger.warning(
        "Redis refuses %s (%s): this worker finds some messages up to a second late. "
        "Give the user of REDIS_URL the rights %s; docs/operations.md has all that a worker needs.",
        command,
        error,
        rights,
    )


class Stage(enum.Enum):
    """Which command of the consuming connection is on its way."""

    IDLE = enum.auto()
    FETCHING = enum.auto()
    CHECKING = enum.auto()
    LEAVING = enum.auto()


class Fetching(stock.Channel):
    """kombu's channel with an atomic fetch in the place of BRPOP."""

    _in_poll: Any = None
    _brpop_sent_at: Any = None
    _stage = Stage.IDLE
    #: Monotonic seconds until which nothing is fetched: Redis refused.
    _not_before_s = 0.0
    _waiting: Waiting | None = None
    _room = Room("")
    #: The lists of the fetch that is on its way, each with its queue, and its keys and arguments.
    _lists: Sequence[tuple[str, str]] = ()
    _fetch: tuple[Any, ...] = ()
    #: How messages of a queue are received: whether without acknowledgements, and the callback.
    _receivers: dict[str, tuple[bool, Callable[[Any], Any]]]

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

    def _open_steps(self) -> Sequence[int]:
        """The priorities that may be fetched now."""
        raise NotImplementedError

    def _open_slots(self) -> int:
        """How many messages of these priorities may be fetched now, at least 1."""
        raise NotImplementedError

    def _may_have_messages(self, parked_list: str) -> bool:
        """Whether to look into a list of messages that an older worker put aside."""
        raise NotImplementedError

    def _receive_messages(self, queue: str, found: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Deliver what was fetched: messages, each with its tag."""
        raise NotImplementedError

    def track(self) -> None:
        """Ask Redis to report on this new connection that a list which was empty changes, or a call.

        Both answers are read here. So from now on an answer belongs to the one command that is on its way,
        and no refusal is taken for that of a fetch, which may have registered a message.
        """
        waiting = self._waiting = Waiting(self.layout)
        self._stage = Stage.IDLE
        connection = self.client.connection
        connection._parser.set_invalidation_push_handler(waiting.hear)
        connection._parser.set_pubsub_push_handler(waiting.hear)
        try:
            connection.send_command("CLIENT", "TRACKING", "ON", "NOLOOP", check_health=False)
            connection.read_response()
        except redis.exceptions.ResponseError as error:
            _warn_of("CLIENT TRACKING", "+client|tracking", str(error))
            return
        try:
            connection.send_command("SUBSCRIBE", waiting.who, check_health=False)
            while not waiting.can_be_called:  # The answer is a notice.
                connection.read_response(push_request=True)
        except redis.exceptions.ResponseError as error:
            _warn_of("SUBSCRIBE", f"+subscribe and &{self.layout.prefix}{CALL}*", str(error))

    def fetch_if_due(self) -> None:
        """Send the next fetch, unless a command is on its way or all lists are known to be empty."""
        if self._stage is Stage.IDLE and self._waiting is not None:
            empty_until_s = self._waiting.room(self._active_queues, self._open_steps()).empty_until_s
            if monotonic() >= max(self._not_before_s, empty_until_s):
                self._brpop_start()

    def _brpop_start(self, timeout: float | None = None) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or self._waiting is None:
            return
        steps = self._open_steps()
        # Priority before queue: the most urgent message of all queues is next.
        self._lists = self._lists_at(queues, steps)
        self._room = self._waiting.room(queues, steps)
        # Stays set: kombu drops a connection that is readable without it.
        self._in_poll = self.client.connection
        self._fetch = self._fetch_command(self._lists, self._room, many=min(self._open_slots(), AT_ONCE))
        self._send(Stage.FETCHING, "EVALSHA", FETCH_DIGEST, *self._fetch)

    def _leave_rooms(self) -> None:
        """The queues change: let others watch. Nobody waits for the answer."""
        rooms = self._waiting.leave() if self._waiting is not None else []
        if rooms and self._stage is Stage.IDLE and self._in_poll:
            keys, places = [room.key for room in rooms], [room.place for room in rooms]
            with suppress(*self.connection_errors):
                self._send(Stage.LEAVING, "EVAL", LEAVE, len(keys), *keys, self._who, *places)

    @property
    def _who(self) -> str:
        return self._waiting.who if self._waiting is not None else ""

    def _fetch_command(
        self,
        lists: Sequence[tuple[str, str]],
        room: Room | None = None,
        no_ack: bool = False,
        many: int = 1,
    ) -> tuple[Any, ...]:
        """Keys and arguments of `FETCH`; without a room it does not wait. `many`: messages at most."""
        layout = self.layout
        keys = [layout.unacked, layout.index, layout.undecodable, room.key if room else ""]
        keys += [layout.prefix + SHARES, layout.prefix + WEIGHTS, *(key for _, key in lists)]
        said = words_of(self._said(queue, key, no_ack=no_ack) for queue, key in lists)
        place = (self._who, room.place) if room else ("", "")
        return (len(keys), *keys, many, *place, PLACE_MS, LIMITS, *said)

    def _lists_at(self, queues: Sequence[str], priorities: Sequence[int]) -> list[tuple[str, str]]:
        """The lists of these queues and priorities in fetching order, each with its queue.

        First those in which it is said that tenants wait, by queue. Then, by priority, those of jobs that
        have none: before them what older workers put aside for this version.
        """
        prefix = self.layout.prefix
        arrivals = dict.fromkeys((queue, arrivals_of(queue, each)) for queue in queues for each in priorities)
        names = []
        for priority, queue in itertools.product(priorities, queues):
            *aside, plain = lists_at(queue, priority, FORMAT_VERSION)
            names += [(queue, name) for name in aside if self._may_have_messages(prefix + name)]
            names.append((queue, plain))
        return [(queue, prefix + name) for queue, name in (*arrivals, *names)]

    def _said(self, queue: str, key: str, *, no_ack: bool) -> tuple[str, str]:
        """What `words_of` takes of a list."""
        if no_ack or self._receivers.get(queue, (False,))[0]:
            return "", ""
        is_of_arrivals = key.startswith(f"{self.layout.prefix}{queue}{ARRIVALS}")
        return queue, key[-1] if is_of_arrivals else ""

    def _plain_client(self) -> Any:
        """A client that leaves keys alone: here they are complete."""
        return redis.Redis(connection_pool=self.pool)

    def _send(self, stage: Stage, *command: Any) -> None:
        self._stage = stage
        self._brpop_sent_at = monotonic()
        # A health check would wait for its answer. kombu's own drops the connection when this answer is late.
        self.client.connection.send_command(*command, check_health=False)

    def _rest(self, seconds: float = 0.0) -> None:
        """No command is on its way; the lists are taken for empty for so long."""
        self._stage = Stage.IDLE
        self._brpop_sent_at = None
        self._room.empty_until_s = monotonic() + seconds if seconds else 0.0

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
                except redis.exceptions.NoScriptError:
                    self._send(Stage.FETCHING, "EVAL", FETCH, *self._fetch)
                except redis.exceptions.ResponseError as error:
                    refusal_log.refused("fetch", error)
                    self._rest(CHECK_AGAIN_S)
                    self._not_before_s = self._room.empty_until_s
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
        if reply is None:
            return False  # A notice of Redis: `Waiting` has heard it.
        stage, room = self._stage, self._room
        if stage is Stage.FETCHING:
            refusal_log.answered("fetch")
            if len(reply) >= 3:
                room.place = ""
                self._rest()
                index, *found = reply
                queue = self._lists[index][0]
                self._queue_cycle.rotate(queue)
                self._receive_messages(queue, list(zip(found[::2], found[1::2], strict=True)))
                return True
            if reply[0] == AGAIN:
                self._rest()
                return False
            room.place = reply[0].decode()
            self._rest(self._pause_s)
            if room.watches:
                self._send(Stage.CHECKING, "EXISTS", *(key for _, key in self._lists))
        else:
            self._rest(self._pause_s if stage is Stage.CHECKING and not reply else 0)
        return False

    @property
    def _pause_s(self) -> float:
        """Seconds for which lists that were empty are taken for empty, unless a notice comes before."""
        return LOOK_AGAIN_S if self._waiting and self._waiting.can_be_called else CHECK_AGAIN_S
