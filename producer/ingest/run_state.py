"""A run of prompt files in Redis: what was sent, what has ended, and who feeds it.

    smallcat:run:<run>          hash    `fed` jobs sent, `cursor` after them, `ended`, `total` once known,
                                        the lists that were used, the models that names were pinned to,
                                        what jobs' ids mean, and `waiting`, jobs that wait for others
    smallcat:run:<run>:done     bits    a bit for each job that is done, set by the workers
    smallcat:run:<run>:failed   bits    likewise, for jobs that failed for good or were cancelled
    smallcat:run:<run>:cancelled  bits  those of the failed that were cancelled
    smallcat:run:<run>:news     list    the outcome of each job, until the feeder has written it down
    smallcat:run:<run>:feeder   string  the process that feeds the run; expires when it falls silent

The jobs that have neither bit are what is left to do. All keys expire when nothing has happened to the run
for as long as a record lives. A window of messages and the new cursor are written in one step, and only if
the cursor is where the feeder expects it. So a feeder that is killed at any instant leaves both or neither,
and of two feeders only one sends.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from producer.ingest.ended import Ended
from producer.ingest.sent import Sent, arguments
from worker.broker.transport import OLD_UNACKED, UNACKED
from worker.contract.errors import PromptFileError
from worker.contract.found_message import digest_of
from worker.contract.message import TASK, run_mark_in
from worker.contract.queues import arrivals_of, list_of, list_of_parked, queue_of_list, tenant_of_list
from worker.contract.refusals import code_of
from worker.state import run_scripts
from worker.state.keys import QUEUES, RUNS, job_key, run_key
from worker.state.parked import parked_lists
from worker.state.shared_scripts import SharedScript

if TYPE_CHECKING:
    from redis.client import Redis


#: Seconds after which another machine can take over the run of a silent feeder. On the feeder's own machine
#: another process can as soon as the feeder is dead.
FEEDER_TTL_S: Final = 10
#: Runs that are listed, at most: those that were begun or resumed last.
MAX_RUNS: Final = 1_000
#: Outcomes that are read at once.
OUTCOMES_AT_ONCE: Final = 2_000
#: Tells this process from an earlier one that had its process id.
_PROCESS: Final = secrets.token_hex(8)


#: What the keys of a run end in that know what became of its jobs.
PARTS: Final = ("done", "failed", "cancelled", "news", "prints")
#: What `feed.lua` returns where the run was cancelled.
CANCELLED: Final = -2


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    #: Jobs sent.
    fed: int
    #: Jobs that are done, failed or cancelled.
    ended: int
    #: Jobs in all; None until the end of the files was read.
    total: int | None
    #: Lines rejected so far.
    rejected: int
    #: Messages in the lists that the run uses, also those of others and those that wait for newer workers.
    queued: int
    #: Where feeding continues, as `Cursor` writes it.
    cursor: str
    #: Whether it was cancelled: nothing more is sent.
    is_cancelled: bool = False
    #: Those of `queued` that wait for newer workers.
    parked: int = 0
    #: Jobs that wait for the pictures of others, outside of the lists.
    waiting: int = 0

    @property
    def is_over(self) -> bool:
        """Whether every job has ended."""
        return self.total is not None and self.ended >= self.total


class Run:
    """One run. `digest` stands for all that determines its jobs; with another one it is another run."""

    def __init__(self, client: Redis, run_id: str, digest: str, ttl_s: int) -> None:
        self.id = run_id
        self._redis = client
        self._ttl_s = ttl_s
        self._digest = digest
        self._key = run_key(run_id)
        self._token = f"{socket.gethostname()}:{os.getpid()}:{_PROCESS}:{secrets.token_hex(4)}"
        self._lists: list[str] = []
        self._feed = SharedScript(client, run_scripts.FEED)
        self._take = SharedScript(client, run_scripts.TAKE)
        self._acknowledge = SharedScript(client, run_scripts.ACKNOWLEDGE)
        self._hex = SharedScript(client, run_scripts.HEX)
        #: The outcomes that were read last.
        self._outcomes: list[str] = []

    @property
    def queues(self) -> list[str]:
        """The queues that its jobs were sent to."""
        return sorted({queue_of_list(name) for name in self._lists})

    def take(self, timeout_s: float = FEEDER_TTL_S + 2) -> None:
        """Become the run's feeder, and create the run where there is none.

        Waits up to `timeout_s` seconds for the claim of a feeder that has fallen silent to expire.

        Raises `PromptFileError` where another process feeds the run, or it was begun with other files.
        """
        deadline = time.monotonic() + timeout_s
        while (holder := self._try_to_take()) != self._token:
            if time.monotonic() > deadline:
                raise PromptFileError(
                    f"{feeder_of(holder)} is feeding this run, {self.id}: stop it, or let it go on and "
                    f"follow it with `smallcat status --run {self.id}`."
                )
            time.sleep(0.1)
        with self._redis.pipeline() as pipe:
            pipe.hsetnx(self._key, "what", self._digest)
            pipe.hsetnx(self._key, "fed", 0)
            pipe.hsetnx(self._key, "created", int(time.time()))
            pipe.hset(self._key, "ttl", self._ttl_s)
            pipe.expire(self._key, self._ttl_s)
            pipe.zadd(RUNS, {self.id: time.time()})
            pipe.zremrangebyrank(RUNS, 0, -1 - MAX_RUNS)
            pipe.expire(RUNS, self._ttl_s)
            pipe.hgetall(self._key)
            fields: dict[str, str] = pipe.execute()[-1]
        if fields["what"] != self._digest:
            raise PromptFileError(
                f"The run {self.id} was begun with other files or options: use those, or another --run."
            )
        self._lists = [name.removeprefix("list:") for name in fields if name.startswith("list:")]

    def begin_anew(self, keep: Sequence[str] = ()) -> None:
        """Forget what became of the run's jobs, but for the fields `keep` that were noted.

        What is done lies in the bucket and is not rendered again.
        """
        kept = {name: value for name in keep if (value := self.noted(name)) is not None}
        self._redis.delete(self._key, *(f"{self._key}:{part}" for part in PARTS))
        self.take()
        for name, value in kept.items():
            self.note(name, value)

    def release(self, *, unlist: bool = False) -> None:
        """Stop being the feeder: another process may feed the run at once.

        With `unlist`, lists of runs leave it out until it is fed again, unless it has jobs or rejected lines.
        """
        if self._redis.get(f"{self._key}:feeder") != self._token:
            return
        if unlist and not any(int(self.noted(name) or 0) for name in ("fed", "rejected")):
            self._redis.zrem(RUNS, self.id)
        self._redis.delete(f"{self._key}:feeder")

    def status(self) -> Status:
        """How far the run is. Also renews this feeder's claim on the run.

        Raises `PromptFileError` where another process feeds it by now, or it has expired.
        """
        if (holder := self._try_to_take()) != self._token:
            raise PromptFileError(f"{feeder_of(holder)} has taken this run over, {self.id}: let it go on.")
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hmget(self._key, "fed", "ended", "total", "rejected", "cursor", "cancelled", "waiting")
            for name in self._lists:
                pipe.llen(name)
            (fed, ended, total, rejected, cursor, cancelled, waiting), *lengths = pipe.execute()
        if fed is None:
            raise PromptFileError(f"The run {self.id} has expired meanwhile: start it again.")
        parked = sum(self._parked().values())
        return Status(
            int(fed),
            int(ended or 0),
            None if total is None else int(total),
            int(rejected or 0),
            sum(lengths) + parked,
            cursor or "",
            cancelled is not None,
            parked,
            int(waiting or 0),
        )

    def feed(
        self, before: int, messages: Sequence[Sent], cursor: str, total: int | None, rejected: int
    ) -> bool:
        """Send `messages` and move the cursor: both or neither. Jobs wait whose `parents` are not done.

        `before` is the number of jobs fed before. Calling it again after a lost connection sends once.
        Where the run was cancelled, nothing is sent. False: nothing was sent, because the run is not what
        `status` said; another process feeds it, or Redis has lost what was written last.
        """
        lists = sorted({each.list for each in messages} | set(self._lists))
        numbers = {name: number for number, name in enumerate(lists, 1)}
        queues = sorted({queue_of_list(name) for name in lists})
        args: list[str | int | bytes] = [
            self._token,
            secrets.token_hex(8),
            before,
            before + len(messages),
            cursor,
        ]
        prints = b"".join(_print(each.message) for each in messages)
        args += ["" if total is None else total, rejected, self._ttl_s, prints, len(queues), *queues]
        args += arguments(messages, numbers)
        keys = [self._key, f"{self._key}:feeder", QUEUES, f"{self._key}:prints", *lists]
        if (answer := self._feed(keys=keys, args=args)) == CANCELLED:
            return True
        if answer == 1:
            self._lists = lists
        return bool(answer == 1)

    def send_again(self, messages: Mapping[int, Sent]) -> None:
        """Send new messages, by the jobs' numbers, of jobs that were fed and whose messages are lost."""
        prints = f"{self._key}:prints"
        with self._redis.pipeline() as pipe:
            for number, sent in messages.items():
                pipe.hset(prints, f"={number}", _print(sent.message))
                pipe.lpush(sent.list, sent.message)
                queue, priority, tenant = tenant_of_list(sent.list)
                if tenant:
                    pipe.lpush(arrivals_of(queue, priority), tenant)
            pipe.expire(prints, self._ttl_s)
            pipe.execute()

    def outcomes(self) -> list[Ended]:
        """The outcomes that are not yet acknowledged, oldest first; up to `OUTCOMES_AT_ONCE`."""
        found = self._redis.lrange(f"{self._key}:news", 0, OUTCOMES_AT_ONCE - 1)
        self._outcomes = cast("list[str]", found)
        return [ended for text in self._outcomes if (ended := Ended.parse(text)) is not None]

    def acknowledge(self) -> None:
        """Remove from Redis what `outcomes` returned last: it is written down."""
        if self._outcomes:
            args: list[str | int] = [len(self._outcomes), self._outcomes[0]]
            self._acknowledge(keys=[f"{self._key}:news"], args=args)
            self._outcomes = []

    def counts(self) -> tuple[int, int]:
        """Jobs that are done, and jobs that failed or were cancelled."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.bitcount(f"{self._key}:done")
            pipe.bitcount(f"{self._key}:failed")
            # The list of runs lives as long as the longest of them.
            pipe.expire(RUNS, self._ttl_s)
            done, failed, _ = pipe.execute()
        return int(done), int(failed)

    def state_of(self, number: int) -> str | None:
        """`done` or `failed` by the job's bits; None where it has not ended."""
        if self._redis.getbit(f"{self._key}:done", number):
            return "done"
        return "failed" if self._redis.getbit(f"{self._key}:failed", number) else None

    def lost(self, fed: int) -> set[int]:
        """Jobs that were fed, have not ended, and whose message is neither queued nor held by a worker.

        One that waits for a newer worker is queued. To be called when the other lists are empty. A job whose
        second message was dropped because its first is in flight (`Claim.TAKEN`) is among them:
        `are_in_flight` tells it from a lost one.
        """
        # Workers of earlier versions put a tenant's messages where they put those of others.
        lists = {*self._lists, *map(_of_nobody, self._lists)}
        held = self._indexes_in(lists) | self._indexes_held()
        if parked := self._parked():
            # From held to parked and back: what is not seen here was seen before, or is afterwards.
            held |= self._indexes_in(parked) | self._indexes_held()
        # Read last: a message that was acknowledged meanwhile has set its bit before.
        return {index for index in self._unfinished(fed) if index not in held}

    def are_in_flight(self, ids: Sequence[str]) -> list[bool]:
        """For each job whether it runs, waits for others, or was submitted beside the runs."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hmget(job_key(job_id), "state", "bulk", "waits_for")
            return [
                state == "running" or (state == "queued" and (not bulk or waits_for is not None))
                for state, bulk, waits_for in pipe.execute()
            ]

    def note_once(self, name: str, value: str) -> str:
        """Store a field with the run, unless it has one of that name. Returns the value that it has."""
        with self._redis.pipeline() as pipe:
            pipe.hsetnx(self._key, name, value)
            pipe.hget(self._key, name)
            return str(pipe.execute()[1])

    def note(self, name: str, value: str) -> None:
        """Store a field with the run, replacing an earlier value."""
        self._redis.hset(self._key, name, value)

    def noted(self, name: str) -> str | None:
        """A field of the run; None where it has none of that name."""
        return cast("str | None", self._redis.hget(self._key, name))

    def now(self) -> int:
        """Unix seconds by Redis' clock."""
        return int(self._redis.time()[0])

    def _indexes(self, messages: Iterable[object]) -> set[int]:
        """The numbers of this run's jobs that the messages carry."""
        marks = (run_mark_in(message) for message in messages)
        return {mark.number for mark in marks if mark is not None and mark.run == self.id}

    def _indexes_in(self, lists: Iterable[str]) -> set[int]:
        found: set[int] = set()
        with self._redis.pipeline(transaction=False) as pipe:
            for name in lists:
                pipe.lrange(name, 0, -1)
            for texts in pipe.execute():
                found |= self._indexes(json.loads(text) for text in texts)
        return found

    def _indexes_held(self) -> set[int]:
        return self._indexes(json.loads(text)[0] for text in self._held())

    def _parked(self) -> dict[str, int]:
        """The lists where this run's messages wait for newer workers, and how many messages each has."""
        found = parked_lists(self._redis)
        mine = set(map(_of_nobody, self._lists))
        return {name: count for name, count in found.items() if list_of_parked(name) in mine}

    def _held(self) -> list[str]:
        """What workers hold, those of earlier versions included."""
        found: list[str] = []
        for name in (UNACKED, OLD_UNACKED):
            try:
                found += cast("list[str]", self._redis.hvals(name))
            except Exception as error:
                # A user may be allowed neither: other applications use the old name, too. What is held is
                # then sent again, which renders nothing twice.
                if code_of(error) != "NOPERM":
                    raise
        return [text for text in found if f'"{TASK}"' in text]

    def _unfinished(self, fed: int) -> Iterator[int]:
        """Jobs whose bits are both 0."""
        texts = [self._hex([f"{self._key}:{part}"]) for part in ("done", "failed")]
        done, failed = (bytes.fromhex(text).ljust(fed // 8 + 1, b"\0") for text in texts)
        for index, (one, other) in enumerate(zip(done, failed, strict=False)):
            if (both := one | other) != 0xFF:
                for bit in range(8):
                    if not both >> (7 - bit) & 1 and index * 8 + bit < fed:
                        yield index * 8 + bit

    def _try_to_take(self) -> str:
        name = f"{self._key}:feeder"
        holder = str(self._take(keys=[name], args=["", self._token, FEEDER_TTL_S]))
        if holder != self._token and _is_dead(holder):
            holder = str(self._take(keys=[name], args=[holder, self._token, FEEDER_TTL_S]))
        return holder


def _print(message: str) -> bytes:
    """The first bytes of a message's fingerprint."""
    return bytes.fromhex(digest_of(message)[:16])


def feeder_of(token: str) -> str:
    """The feeder of that token, for people."""
    host, _, rest = token.partition(":")
    return f"Process {rest.partition(':')[0]} on {host}"


def _is_dead(token: str) -> bool:
    """Whether the feeder of that token ran on this machine and has ended."""
    try:
        host, pid, process, _ = token.split(":")
        if host != socket.gethostname():
            return False
        if int(pid) == os.getpid():
            return process != _PROCESS
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):  # The latter: it is no feeder's.
        return False
    return False


def _of_nobody(name: str) -> str:
    """The list of the same queue and priority for jobs without a tenant."""
    queue, priority, tenant = tenant_of_list(name)
    return list_of(queue, priority) if tenant else name
