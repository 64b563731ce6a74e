"""A run of prompt files as Redis knows it: what was sent, what has ended, and who feeds it.

    smallcat:run:<run>          hash    `fed` jobs sent, `cursor` after them, `ended`, `total` once known,
                                        the lists that were used, the models that names were pinned to
    smallcat:run:<run>:done     bits    set by the workers; with `:failed` the proof of what is left to do
    smallcat:run:<run>:failed   bits    likewise, for jobs that failed for good or were cancelled
    smallcat:run:<run>:news     list    what became of each job, until the feeder has written it down
    smallcat:run:<run>:feeder   string  who feeds it; expires when that one falls silent

All of them expire when nothing has happened to the run for as long as a record lives. A window of jobs and
the new cursor are one step, which is done only if the cursor is where the feeder believes: a feeder that is
killed at any instant leaves both or neither, and of two feeders only one sends.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from worker.broker.transport import UNACKED
from worker.contract.errors import PromptFileError
from worker.contract.message import run_mark_in
from worker.contract.queues import queue_of_list
from worker.state.records import QUEUES, key, run_key

if TYPE_CHECKING:
    from redis.client import Redis


#: Seconds after which a silent feeder's run can be taken over from another machine; on the same machine it
#: is at once.
FEEDER_TTL_S: Final = 10
#: News that are fetched at once.
NEWS: Final = 2_000
#: This process, for telling it from an earlier one that had its number.
_PROCESS: Final = secrets.token_hex(8)

# KEYS: run, feeder, queues, then lists. ARGV: token, window, fed before, fed after, cursor, total, rejected,
# ttl, number of queues, the queues, then list number and message in turn.
# Returns 1: done, now or by an earlier try; 0: somebody else has fed; -1: somebody else is the feeder.
_FEED: Final = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return -1 end
if redis.call('HGET', KEYS[1], 'window') == ARGV[2] then return 1 end
if redis.call('HGET', KEYS[1], 'fed') ~= ARGV[3] then return 0 end
local first = 10 + ARGV[9]
for i = first, #ARGV, 2 do redis.call('LPUSH', KEYS[3 + ARGV[i]], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'window', ARGV[2], 'fed', ARGV[4], 'cursor', ARGV[5], 'rejected', ARGV[7])
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'total', ARGV[6]) end
for i = 4, #KEYS do redis.call('HSET', KEYS[1], 'list:' .. KEYS[i], 1) end
for i = 10, first - 1 do redis.call('SADD', KEYS[3], ARGV[i]) end
for _, name in ipairs({KEYS[1], KEYS[1] .. ':done', KEYS[1] .. ':failed', KEYS[1] .. ':news', KEYS[3]}) do
  redis.call('EXPIRE', name, ARGV[8])
end
return 1
"""

# KEYS: feeder. ARGV: the token that may be there, the new one, its life in seconds. Returns who has it.
_TAKE: Final = """
local holder = redis.call('GET', KEYS[1])
if not holder or holder == ARGV[1] or holder == ARGV[2] then
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
  return ARGV[2]
end
return holder
"""

# KEYS: news. ARGV: number, the oldest. Sent twice, it removes once.
_HEARD: Final = """
if redis.call('LINDEX', KEYS[1], 0) == ARGV[2] then redis.call('LTRIM', KEYS[1], ARGV[1], -1) end
"""

# KEYS: bits. As hexadecimal, because the client decodes what it reads.
_HEX: Final = """
local hex = function(byte) return string.format('%02x', string.byte(byte)) end
return (string.gsub(redis.call('GET', KEYS[1]) or '', '.', hex))
"""


class Ended(NamedTuple):
    """What became of a job, as the workers' scripts tell it (`worker.state.scripts`)."""

    #: The job's place in the run, from 0: its bit.
    number: int
    file: int
    line: int
    id: str
    state: str
    uri: str | None
    timings: dict[str, float | None]
    error_type: str | None
    error: str | None
    cached: bool
    attempts: int


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    #: Jobs sent.
    fed: int
    #: Jobs that are done, failed or cancelled.
    ended: int
    #: Jobs in all; None until the end of the files was seen.
    total: int | None
    #: Lines that were no jobs, so far.
    rejected: int
    #: Messages in the lists that the run uses, whoever sent them.
    queued: int
    #: Where feeding goes on.
    cursor: str

    @property
    def is_over(self) -> bool:
        """Whether every job has ended."""
        return self.total is not None and self.ended >= self.total


class Run:
    """One run. `what` stands for all that determines its jobs: with other files it is another run."""

    def __init__(self, client: Redis, run_id: str, what: str, ttl_s: int) -> None:
        self.id = run_id
        self._redis = client
        self._ttl_s = ttl_s
        self._what = what
        self._key = run_key(run_id)
        self._token = f"{socket.gethostname()}:{os.getpid()}:{_PROCESS}:{secrets.token_hex(4)}"
        self._lists: list[str] = []
        self._feed = client.register_script(_FEED)
        self._take = client.register_script(_TAKE)
        self._hear = client.register_script(_HEARD)
        self._told: list[str] = []

    @property
    def queues(self) -> list[str]:
        """The queues that its jobs were sent to."""
        return sorted({queue_of_list(name) for name in self._lists})

    def take(self, timeout_s: float = FEEDER_TTL_S + 2) -> None:
        """Become the run's feeder, and make it where there is none. Waits for a silent one to be given up.

        Raises `PromptFileError` where another process feeds it, or the run's name stands for other files.
        """
        deadline = time.monotonic() + timeout_s
        while (holder := self._try_to_take()) != self._token:
            if time.monotonic() > deadline:
                host, pid, *_ = holder.split(":")
                raise PromptFileError(
                    f"Process {pid} on {host} is feeding this run: stop it, or let it go on."
                )
            time.sleep(0.1)
        with self._redis.pipeline() as pipe:
            pipe.hsetnx(self._key, "what", self._what)
            pipe.hsetnx(self._key, "fed", 0)
            pipe.hsetnx(self._key, "created", int(time.time()))
            pipe.hset(self._key, "ttl", self._ttl_s)
            pipe.expire(self._key, self._ttl_s)
            pipe.hgetall(self._key)
            fields: dict[str, str] = pipe.execute()[-1]
        if fields["what"] != self._what:
            raise PromptFileError(
                f"The run {self.id} was begun with other files or options: use those, or another --run."
            )
        self._lists = [name.removeprefix("list:") for name in fields if name.startswith("list:")]

    def leave(self) -> None:
        """Let another process feed the run at once."""
        if self._redis.get(f"{self._key}:feeder") == self._token:
            self._redis.delete(f"{self._key}:feeder")

    def status(self) -> Status:
        """How far the run is. Tells, too, that this feeder lives; `PromptFileError` if another has it."""
        if (holder := self._try_to_take()) != self._token:
            raise PromptFileError(f"Another process ({holder}) has taken this run over.")
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hmget(self._key, "fed", "ended", "total", "rejected", "cursor")
            for name in self._lists:
                pipe.llen(name)
            (fed, ended, total, rejected, cursor), *lengths = pipe.execute()
        if fed is None:
            raise PromptFileError(f"The run {self.id} has expired meanwhile: start it again.")
        return Status(
            int(fed),
            int(ended or 0),
            None if total is None else int(total),
            int(rejected or 0),
            sum(lengths),
            cursor or "",
        )

    def feed(
        self, before: int, messages: Sequence[tuple[str, str]], cursor: str, total: int | None, rejected: int
    ) -> None:
        """Send `messages`, each with the list it goes to, and move the cursor: both or neither.

        `before` is how many were fed before. May be sent again after a lost connection.
        Raises `PromptFileError` where somebody else has fed meanwhile.
        """
        lists = sorted({name for name, _ in messages} | set(self._lists))
        places = {name: number for number, name in enumerate(lists, 1)}
        queues = sorted({queue_of_list(name) for name in lists})
        args: list[str | int] = [self._token, secrets.token_hex(8), before, before + len(messages), cursor]
        args += ["" if total is None else total, rejected, self._ttl_s, len(queues), *queues]
        args += [item for name, message in messages for item in (places[name], message)]
        keys = [self._key, f"{self._key}:feeder", QUEUES, *lists]
        if self._feed(keys=keys, args=args) != 1:
            raise PromptFileError("Another process has fed this run meanwhile: start again to follow it.")
        self._lists = lists

    def send_again(self, messages: Iterable[tuple[str, str]]) -> None:
        """Send messages of jobs that were fed, and whose messages are gone."""
        with self._redis.pipeline() as pipe:
            for name, message in messages:
                pipe.lpush(name, message)
            pipe.execute()

    def news(self) -> list[Ended]:
        """What has ended and is not yet written down, oldest first. `heard` removes it."""
        self._told = cast("list[str]", self._redis.lrange(f"{self._key}:news", 0, NEWS - 1))
        return [_ended(text) for text in self._told]

    def heard(self) -> None:
        """Forget what `news` gave: it is written down."""
        if self._told:
            self._hear(keys=[f"{self._key}:news"], args=[len(self._told), self._told[0]])
            self._told = []

    def counts(self) -> tuple[int, int]:
        """Jobs that are done, and jobs that failed or were cancelled."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.bitcount(f"{self._key}:done")
            pipe.bitcount(f"{self._key}:failed")
            done, failed = pipe.execute()
        return int(done), int(failed)

    def state_of(self, number: int) -> str | None:
        """`done` or `failed` by the job's bits; None: it has not ended."""
        if self._redis.getbit(f"{self._key}:done", number):
            return "done"
        return "failed" if self._redis.getbit(f"{self._key}:failed", number) else None

    def lost(self, fed: int) -> set[int]:
        """Jobs that were fed, have not ended, and whose message is neither queued nor held by a worker.

        To be asked when the lists are empty. A job whose second message was dropped because the first is
        on board (`Claim.TAKEN`) counts as lost here; `is_on_board` tells.
        """
        held: set[int] = set()
        with self._redis.pipeline(transaction=False) as pipe:
            for name in self._lists:
                pipe.lrange(name, 0, -1)
            for texts in pipe.execute():
                held |= self._indexes(json.loads(text) for text in texts)
        for text in cast("list[str]", self._redis.hvals(UNACKED)):
            held |= self._indexes([json.loads(text)[0]])
        # Last: a message that was acknowledged meanwhile has set its bit before.
        return {index for index in self._open(fed) if index not in held}

    def are_on_board(self, ids: Sequence[str]) -> list[bool]:
        """For each job whether its record says that a worker has it, or will."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(key(job_id), "state")
            return [state in ("queued", "running") for state in pipe.execute()]

    def keep(self, name: str, value: str) -> str:
        """Note something with the run once; returns what was noted first."""
        with self._redis.pipeline() as pipe:
            pipe.hsetnx(self._key, name, value)
            pipe.hget(self._key, name)
            return str(pipe.execute()[1])

    def note(self, name: str, value: str) -> None:
        """Note something with the run, in the place of what was there."""
        self._redis.hset(self._key, name, value)

    def noted(self, name: str) -> str | None:
        """What was noted."""
        return cast("str | None", self._redis.hget(self._key, name))

    def now(self) -> int:
        """Unix seconds by Redis' clock."""
        return int(self._redis.time()[0])

    def _indexes(self, messages: Iterable[object]) -> set[int]:
        """Those jobs of this run that the messages carry."""
        marks = (run_mark_in(message) for message in messages)
        return {mark.number for mark in marks if mark is not None and mark.run == self.id}

    def _open(self, fed: int) -> Iterator[int]:
        """Jobs whose bits are both 0."""
        with self._redis.pipeline(transaction=False) as pipe:
            for part in ("done", "failed"):
                pipe.eval(_HEX, 1, f"{self._key}:{part}")
            done, failed = (bytes.fromhex(text).ljust(fed // 8 + 1, b"\0") for text in pipe.execute())
        for place, (one, other) in enumerate(zip(done, failed, strict=False)):
            if (both := one | other) != 0xFF:
                for bit in range(8):
                    if not both >> (7 - bit) & 1 and place * 8 + bit < fed:
                        yield place * 8 + bit

    def _try_to_take(self) -> str:
        name = f"{self._key}:feeder"
        holder = str(self._take(keys=[name], args=["", self._token, FEEDER_TTL_S]))
        if holder != self._token and _is_dead(holder):
            holder = str(self._take(keys=[name], args=[holder, self._token, FEEDER_TTL_S]))
        return holder


def _ended(text: str) -> Ended:
    number, file, line, job_id, state, uri, timings, error_type, error, cached, attempts = json.loads(text)
    return Ended(
        number,
        file,
        line,
        job_id,
        state,
        uri or None,
        json.loads(timings) if timings else {},
        error_type or None,
        error or None,
        cached == "true",
        int(attempts or 0),
    )


def _is_dead(token: str) -> bool:
    """Whether the feeder of that token ran on this machine, and does no more."""
    host, pid, process, _ = token.split(":")
    if host != socket.gethostname():
        return False
    if int(pid) == os.getpid():
        return process != _PROCESS
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
