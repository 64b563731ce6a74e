"""Following many jobs on one event loop: their states and steps, read for all followers together.

Redis is read on one connection, at most four times a second and for at most a tenth of the time: the more
jobs are followed, the less often. A follower has what was read last and no list of what it has not seen yet,
so a slow one takes no memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from worker.contract.job_parameters import MAX_PRIORITY
from worker.contract.queues import list_of
from worker.state.keys import WORKERS_CHANNEL, job_key
from worker.state.redis_client import connect_async

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Seconds between two readings, at least, and how many times longer than a reading a pause is, at least.
EVERY_S, PAUSE = 0.25, 10.0
#: Seconds between two requests to the workers to write their jobs' steps often.
ASK_EVERY_S: Final = 2.0
#: Jobs that are read in one round trip: few, because nothing else runs while the answers are parsed.
AT_ONCE: Final = 50
#: What is read of a job.
_FIELDS: Final = ("state", "step", "steps", "queue", "waits_for")


@dataclass(frozen=True)
class Seen:
    """What was read of a job."""

    #: The job's state, as a record says it; empty where Redis has no record (any more).
    state: str
    #: Denoising steps done, and in all; 0 until a worker renders the job.
    step: int
    steps: int
    #: Messages of its tenant that workers may fetch before the job's own, at most; 0 once it runs.
    ahead: int
    #: Whether the submission is among those that want the job. True where none is followed.
    is_wanted: bool


@dataclass(eq=False)
class Follower:
    """One follower of one job."""

    job_id: str
    #: Whose job it is; empty: that of somebody who knows the job's id alone.
    submission: str
    #: The job's priority, 0 to 9.
    priority: int
    #: The job's tenant; empty: it has none.
    tenant: str = ""
    #: What was read last; None: nothing yet.
    seen: Seen | None = None
    #: Why nothing more is read.
    error: Exception | None = None
    #: Set when there is something new.
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Following:
    """Reads jobs for the followers of one event loop."""

    def __init__(self, redis_url: str, retry_s: float) -> None:
        """`retry_s`: seconds after which a Redis that is away ends what is followed."""
        self._redis_url, self._retry_s = redis_url, retry_s
        self._followers: set[Follower] = set()
        self._task: asyncio.Task[None] | None = None
        self._asked_s = 0.0

    @contextmanager
    def follow(self, job_id: str, submission: str, priority: int, tenant: str = "") -> Iterator[Follower]:
        """A follower, from within the event loop."""
        follower = Follower(job_id, submission, priority, tenant)
        self._followers.add(follower)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="smallcat followed jobs")
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    async def close(self) -> None:
        """Stop reading, and close the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        read_s = loop.time()
        async with connect_async(self._redis_url, self._retry_s) as client:
            while self._followers:
                began_s = loop.time()
                try:
                    await self._read(client)
                    read_s = loop.time()
                except Exception as error:  # noqa: BLE001 - each follower gets it
                    if loop.time() - read_s > self._retry_s:
                        self._end(error)
                        return
                await asyncio.sleep(max(EVERY_S, PAUSE * (loop.time() - began_s)))

    def _end(self, error: Exception) -> None:
        for follower in self._followers:
            follower.error = error
            follower.changed.set()
        self._followers.clear()

    async def _read(self, client: Redis) -> None:
        """Read all jobs once."""
        now_s = asyncio.get_running_loop().time()
        followed: dict[str, list[Follower]] = {}
        for follower in self._followers:
            followed.setdefault(follower.job_id, []).append(follower)
        ids = list(followed)
        lengths: dict[tuple[str, str], list[int]] = {}
        is_running = False
        for start in range(0, len(ids), AT_ONCE):
            part = ids[start : start + AT_ONCE]
            submissions = [sorted({each.submission for each in followed[job_id]}) for job_id in part]
            async with client.pipeline(transaction=False) as pipe:
                for job_id, mine in zip(part, submissions, strict=True):
                    _ = pipe.hmget(job_key(job_id), *_FIELDS, *(f"sub:{each}" for each in mine))
                found: list[Any] = await pipe.execute(raise_on_error=False)
            queues = {
                (str(values[3]), each.tenant)
                for job_id, values in zip(part, found, strict=True)
                if isinstance(values, list) and values[3]
                for each in followed[job_id]
            }
            await self._measure(client, queues - lengths.keys(), lengths)
            for job_id, mine, values in zip(part, submissions, found, strict=True):
                if not isinstance(values, list):
                    continue
                wanted = dict(zip(mine, values[len(_FIELDS) :], strict=True))
                for follower in followed[job_id]:
                    _tell(follower, values, wanted[follower.submission] is not None, lengths)
                is_running = is_running or values[0] == "running"
            await asyncio.sleep(0)  # Others may have waited.
        if is_running and now_s - self._asked_s >= ASK_EVERY_S:
            self._asked_s = now_s
            await client.publish(WORKERS_CHANNEL, "watch")

    async def _measure(
        self,
        client: Redis,
        queues: set[tuple[str, str]],
        lengths: dict[tuple[str, str], list[int]],
    ) -> None:
        """Add the lengths of the lists of each queue and tenant, the most urgent first."""
        for queue, tenant in queues:
            async with client.pipeline(transaction=False) as pipe:
                for number in range(MAX_PRIORITY + 1):
                    _ = pipe.llen(list_of(queue, number, tenant))
                found: list[Any] = await pipe.execute(raise_on_error=False)
            lengths[queue, tenant] = [each if isinstance(each, int) else 0 for each in found]


def _tell(
    follower: Follower, values: list[Any], is_wanted: bool, lengths: dict[tuple[str, str], list[int]]
) -> None:
    """Give a follower what was read of its job, if it is new."""
    state, step, steps, queue, waits_for = values[: len(_FIELDS)]
    if state == "queued" and waits_for:
        state = "waiting"
    before = follower.seen
    ahead = 0
    if state == "queued":
        # Those that came later are in the same lists: what was counted once can only become fewer.
        urgent = lengths.get((str(queue), follower.tenant), [])[: MAX_PRIORITY - follower.priority + 1]
        ahead = max(sum(urgent) - 1, 0)
        if before is not None and before.state == "queued":
            ahead = min(ahead, before.ahead)
    is_wanted = is_wanted or not follower.submission
    seen = Seen(str(state or ""), _number(step), _number(steps), ahead, is_wanted)
    if seen != before:
        follower.seen = seen
        follower.changed.set()


def _number(text: Any) -> int:
    return int(text) if isinstance(text, str) and text.isdigit() and len(text) < 10 else 0
