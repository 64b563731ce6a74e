"""The messages that this process holds from one Redis: their leases are renewed until they are done with.

Held messages belong to the process, not to the connection that delivered them: a job outlives its
connection. One daemon thread with a connection of its own sends all that a held message needs of Redis:

1. send: acknowledgements, and messages that are given back, again until Redis has answered;
2. renew: set the score of each held message to Redis' time, at every quarter of the lease;
   It looks then which lists of parked messages are not empty, for those who fetch;
3. sweep: put messages whose lease ran out, whoever held them, back into their queues.

Only Redis' clock decides when a lease ends. After an outage of Redis each process waits for half a lease
before it sweeps, so that all others can renew first.
"""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from time import monotonic, sleep
from typing import Any, Final

from redis import Redis
from redis.exceptions import RedisError

from worker.broker.adoption import Adoption
from worker.broker.layout import Layout
from worker.broker.moves import (
    LAST,
    NEXT,
    Recorded,
    Unsent,
    Wait,
    given_back,
    parked,
    restored,
    set_aside,
    waiting,
)
from worker.broker.scripts import EXPIRED, RENEW
from worker.broker.sending import send_move, send_recorded, send_wait, tell
from worker.broker.transport import alive, max_returns
from worker.contract.refusals import code_of, refusal_log

logger = logging.getLogger("smallcat.transport")

#: Seconds for which a closing channel, and an ending process, wait until Redis has answered.
FLUSH_S: Final = 5.0


#: Seconds until a message comes back that is not acknowledged, because its record does not say why it should.
UNRECORDED_S: Final = 1.0

#: Seconds until a command that Redis did not answer is sent again.
RETRY_S: Final = 0.25


@dataclass(frozen=True)
class Held:
    """A message that this process works on."""

    #: Whoever fetched it, and gives it back when it closes; None once that one's connection is lost.
    owner: object | None
    #: The message as it was in the list; None for a broadcast, which is nowhere in Redis.
    raw: bytes | None
    queue: str
    #: Seconds until it may be fetched again, once it is given back by `requeue`.
    delay_s: float = 0.0
    #: Whether that counts: see `postpone`.
    counts: bool = False
    #: What must be so for its acknowledgement to count, where that is not certain.
    recorded: Recorded | None = None
    #: Whether Redis has it no longer: it was acknowledged, and takes its place here until its task has ended.
    is_acknowledged: bool = False

    @property
    def is_registered(self) -> bool:
        """Whether Redis has it among those that are held."""
        return self.raw is not None and not self.is_acknowledged


class Lease:
    """All messages that this process holds from one Redis, and the thread that renews their leases.

    connect: opens the thread's own client. timeout_s: seconds, > 0: the lease. sweep_every_s: seconds, > 0.
    All methods are safe from every thread, return at once and raise nothing on a lost connection; only
    `flush` waits.
    """

    def __init__(
        self,
        connect: Callable[[], Redis],
        layout: Layout,
        *,
        timeout_s: float,
        sweep_every_s: float,
        sweep_limit: int,
    ) -> None:
        self._connect = connect
        self._layout = layout
        self._timeout_s = timeout_s
        self._sweep_every_s = sweep_every_s
        self._sweep_limit = sweep_limit
        self._adoption = Adoption(layout, timeout_s)
        self._changed = threading.Condition()
        self._consumers: set[object] = set()
        self._held: dict[str, Held] = {}
        #: What Redis has not yet answered, by delivery tag.
        self._unsent: dict[str, Unsent] = {}
        #: Messages that Redis no longer has: by the last renewal, and by the last two.
        self._missing: set[str] = set()
        self._expired: set[str] = set()
        #: The lists of parked messages that were not empty at the last look; None: there was none yet.
        self.parked: frozenset[str] | None = None
        self._thread: threading.Thread | None = None
        self._renewed_at: float | None = None
        self._sweep_not_before = 0.0

    # Called by the consumer.

    def attach(self, consumer: object) -> None:
        """Renew and sweep until `detach`, and then for as long as a message is held or unsent."""
        with self._changed:
            self._consumers.add(consumer)
            self._ensure_thread()

    def detach(self, consumer: object) -> None:
        """Forget a consumer."""
        with self._changed:
            self._consumers.discard(consumer)
            self._changed.notify_all()

    def hold(self, tag: str, held: Held) -> None:
        """Hold a message that Redis has registered as fetched."""
        with self._changed:
            self._held[tag] = held
            self._ensure_thread()

    @property
    def count(self) -> int:
        """How many messages this process holds."""
        return len(self._held)

    def acknowledge(self, tag: str) -> None:
        """The message is done with: the acknowledgement is sent until Redis answers.

        One that this process no longer holds was set aside, parked or given back: another may hold it by now.
        """
        with self._changed:
            if (held := self._held.pop(tag, None)) is not None and not held.is_acknowledged:
                self._enqueue({tag: held.recorded})

    def acknowledged(self, tag: str) -> None:
        """The message was acknowledged with its job's done mark: nothing is to be sent any more."""
        with self._changed:
            if (held := self._held.get(tag)) is not None:
                self._held[tag] = replace(held, is_acknowledged=True)

    def acknowledge_by_record(self, tag: str, records: tuple[str, str], holder: tuple[str, str]) -> None:
        """Let `acknowledge` ask the job's record whether nothing is left to do: see `Recorded`."""
        with self._changed:
            held = self._held.get(tag)
            if held is not None and held.raw is not None:
                self._held[tag] = replace(held, recorded=Recorded(records, holder, held.raw, held.queue))

    def postpone(self, tag: str, delay_s: float, *, counts: bool) -> None:
        """Let the message wait for `delay_s` seconds, once it is given back by `requeue`."""
        with self._changed:
            if (held := self._held.get(tag)) is not None:
                self._held[tag] = replace(held, delay_s=delay_s, counts=counts)

    def requeue(self, tag: str, *, first: bool, counts: bool = False) -> None:
        """Give the message back: `first` to be fetched next, else after all others of its priority.

        `counts`: nobody chose so. A message that comes back too often like this is set aside.
        """
        with self._changed:
            held = self._held.get(tag)
            if held is not None and held.raw is not None and held.delay_s > 0:
                del self._held[tag]
                self._enqueue({tag: waiting(held.raw, held.queue, held.delay_s, counts=held.counts)})
                return
            self._give_back([tag], NEXT if first else LAST, counts=counts)

    def set_aside(self, tag: str, reason: str) -> None:
        """Move a message that this worker cannot read to where a person sees it."""
        with self._changed:
            held = self._held.pop(tag, None)
            if held is not None and held.raw is not None:
                self._enqueue({tag: set_aside(held.raw, reason, held.queue)})

    def park(self, tag: str, version: int) -> None:
        """Move a message of a newer version to where workers that read it look."""
        with self._changed:
            held = self._held.pop(tag, None)
            if held is not None and held.raw is not None:
                self._enqueue({tag: parked(self._layout, held.raw, held.queue, version)})

    def orphan(self, owner: object) -> None:
        """The owner's connection is lost: its messages stay with the process."""
        with self._changed:
            for tag, held in self._held.items():
                if held.owner is owner:
                    self._held[tag] = replace(held, owner=None)

    def give_back(self, owner: object | None) -> int:
        """The owner closes: return its messages and all orphans to their queues. Returns how many."""
        with self._changed:
            tags = [tag for tag, held in self._held.items() if held.owner in (owner, None)]
            # Each is pushed to the end that is fetched next, so the oldest goes last.
            self._give_back(reversed(tags), NEXT)
            return len(tags)

    def flush(self, timeout_s: float) -> bool:
        """Wait until Redis has answered everything. False when `timeout_s` seconds were not enough."""
        with self._changed:
            is_sent = self._changed.wait_for(lambda: not self._unsent, timeout_s)
            if not is_sent:
                logger.error(
                    "Redis did not confirm %d acknowledgements: their jobs are delivered again",
                    len(self._unsent),
                )
            return is_sent

    def end(self, timeout_s: float) -> None:
        """The process ends, perhaps without a connection to close: give back and flush."""
        self.give_back(None)
        self.flush(timeout_s)

    def _give_back(self, tags: Iterable[str], push: str, *, counts: bool = False) -> None:
        limit = max_returns()
        for tag in tags:
            held = self._held.pop(tag, None)
            if held is not None and held.raw is not None and not held.is_acknowledged:
                move = given_back(self._layout, held.raw, held.queue, push, counts=counts, limit=limit)
                self._enqueue({tag: move})

    def _enqueue(self, unsent: Mapping[str, Unsent]) -> None:
        self._unsent.update(unsent)
        self._ensure_thread()
        self._changed.notify_all()

    # Done by the thread.

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="smallcat-lease", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        client = self._connect()
        self._renewed_at = None
        renew_at = sweep_at = monotonic()
        while self._wait(min(renew_at, sweep_at)):
            try:
                self._send(client)
                if monotonic() >= renew_at:
                    self._renew(client)
                    renew_at = monotonic() + self._timeout_s / 4
                    self._look_for_parked(client)
                if monotonic() >= sweep_at:
                    self._sweep(client)
                    sweep_at = monotonic() + self._sweep_every_s
                refusal_log.answered("leases")
            except (RedisError, OSError) as error:
                refusal_log.refused("leases", error)
                # With Sentinel, whoever refuses may be the primary no longer: the next connection asks.
                client.connection_pool.disconnect()
                sleep(RETRY_S)
            except Exception:
                logger.exception("The lease thread goes on after an error")
                sleep(RETRY_S)
        client.close()
        client.connection_pool.disconnect()

    def _wait(self, until: float) -> bool:
        """Wait for something to do; False when nothing can come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._unsent or self._idle, max(0.0, until - monotonic()))
            if self._idle:
                self._thread = None
                return False
            return True

    @property
    def _idle(self) -> bool:
        return not (self._consumers or self._held or self._unsent)

    def _send(self, client: Redis) -> None:
        with self._changed:
            unsent = dict(self._unsent)
        if not unsent:
            return
        done = [tag for tag, move in unsent.items() if move is None]
        for move in unsent.values():
            tell(move)
        recorded = {tag: move for tag, move in unsent.items() if isinstance(move, Recorded)}
        # Each may be done alone, and twice. An index that outlives its message is swept (`restored`).
        pipeline = client.pipeline(transaction=False)
        if done:
            pipeline.hdel(self._layout.unacked, *done)
            pipeline.zrem(self._layout.index, *done)
        for tag, move in unsent.items():
            if isinstance(move, Wait):
                send_wait(pipeline, self._layout, tag, move, self._timeout_s)
            elif move is not None and not isinstance(move, Recorded):
                send_move(pipeline, self._layout, tag, "", move)
        if recorded:
            send_recorded(pipeline, self._layout, recorded)
        results = pipeline.execute()
        kept = [tag.decode() for tag in results[-1]] if recorded else []
        with self._changed:
            for tag, move in unsent.items():
                if self._unsent.get(tag) is move:
                    self._unsent.pop(tag, None)
            for tag in kept:
                held = recorded[tag]
                self._unsent[tag] = waiting(held.raw, held.queue, UNRECORDED_S, counts=False)
                logger.warning(
                    "Message %s is delivered again: Redis has lost the record of how its job ended", tag
                )
            self._changed.notify_all()

    def _renew(self, client: Redis) -> None:
        if not alive():
            logger.critical("The engine has failed: the leases of %d messages are not renewed", self.count)
            return
        with self._changed:
            tags = [tag for tag, held in self._held.items() if held.is_registered]
        missing = client.register_script(RENEW)(keys=[self._layout.index], args=tags)
        found = {tag.decode() for tag in missing}
        now = monotonic()
        if self._renewed_at is not None and now - self._renewed_at > self._timeout_s / 2:
            # The others could not renew either.
            self._sweep_not_before = now + self._timeout_s / 2
        self._renewed_at = now
        with self._changed:
            found = {tag for tag in found if tag in self._held and self._held[tag].is_registered}
        # One that is missing for the first time may have been acknowledged just now.
        for tag in (found & self._missing) - self._expired:
            logger.warning("The lease of message %s ran out while its job ran: it runs a second time", tag)
        self._expired, self._missing = found & self._missing, found

    def _look_for_parked(self, client: Redis) -> None:
        names: Any = sorted(client.smembers(self._layout.parked))
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.llen(name)
        counts = pipeline.execute(raise_on_error=False) if names else []
        # One of another type has no message.
        found = [name for name, count in zip(names, counts, strict=True) if isinstance(count, int) and count]
        self.parked = frozenset(name.decode() for name in found)

    def _sweep(self, client: Redis) -> None:
        layout, old = self._layout, self._adoption.layout
        limits = [str(self._timeout_s), str(self._sweep_limit)]
        due = client.register_script(EXPIRED)(keys=[layout.index, layout.unacked], args=limits)
        adoptable = self._adoption.due(client)
        if not (due or adoptable) or not self._may_sweep():
            return
        with self._changed:
            mine = {tag.encode() for tag in (*self._held, *self._unsent)}
        pipeline = client.pipeline(transaction=False)
        for where, found in ((layout, due), (old, adoptable)):
            for tag, score, entry in found:
                if where is old or tag not in mine:
                    move = restored(layout, entry, max_returns())
                    tell(move)
                    send_move(pipeline, where, tag, score, move)
        results = pipeline.execute(raise_on_error=False)
        errors = [result for result in results if isinstance(result, Exception)]
        if count := sum(result for result in results if not isinstance(result, Exception)):
            logger.warning("Restored %d messages whose worker no longer renews its leases", count)
        if refused := [error for error in errors if code_of(error)]:
            raise refused[0]
        if errors:
            logger.error("%d messages whose lease ran out could not be restored: %s", len(errors), errors[0])

    def _may_sweep(self) -> bool:
        """Whether Redis has answered for long enough that every living worker has renewed."""
        now = monotonic()
        recent = self._renewed_at is not None and now - self._renewed_at <= self._timeout_s / 2
        return recent and now >= self._sweep_not_before
