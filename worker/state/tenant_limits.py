"""What tenants of the HTTP API have used of their limits, in Redis: it holds across all server processes.

    smallcat:http:rate:<tenant>     hash   its token bucket
    smallcat:http:spent:<tenant>    hash   days since 1970-01-01 (UTC) -> pixel steps that were submitted
    smallcat:http:open:<tenant>     zset   ids of its jobs that wait or run, by when to look whether they do
      ...:waiting                   zset   likewise, of its jobs that wait for the pictures of other jobs
    smallcat:http:feeding:<tenant>  hash   its runs -> how many of their jobs were admitted

Each call is one script, by Redis' clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from worker.state import scripts
from worker.state.keys import HTTP_FEEDING, HTTP_OPEN, HTTP_RATE, HTTP_SPENT
from worker.state.shared_scripts import SharedScript

if TYPE_CHECKING:
    from redis.client import Redis

#: Seconds that the note of a request lives: as long as the answer to one with an Idempotency-Key.
NOTE_S: Final = 86_400


class Admission(NamedTuple):
    """What was admitted of jobs."""

    #: The first so many of them.
    jobs: int
    #: The tenant's jobs that waited or ran before.
    open: int
    #: Pixel steps that it had submitted today.
    spent: int
    #: Seconds until the day ends, > 0.
    day_left_s: int
    #: What stopped it: `queued`, `day`, or nothing.
    stopped: str


class TenantLimits:
    """The counters of all tenants in one Redis. Thread-safe. Raises redis-py's errors, `QueueError`."""

    def __init__(self, client: Redis, ttl_s: int) -> None:
        self._redis, self._ttl_s = client, ttl_s
        self._admit = SharedScript(client, scripts.ADMIT)
        self._request = SharedScript(client, scripts.REQUEST)

    def request(self, tenant: str, rate: float, burst: int) -> float:
        """Take a request of the tenant: 0. Where it has none left: seconds until it has one."""
        return float(self._request(keys=[f"{HTTP_RATE}{tenant}"], args=[rate, burst]))

    def admit(
        self,
        tenant: str,
        jobs: Sequence[tuple[str, int]],
        *,
        most_open: int | None,
        most_work: int | None,
        note: str = "",
        parents: Sequence[str] = (),
    ) -> Admission:
        """Admit all of the jobs, pairs of id and pixel steps, or none.

        `parents` are, for each job, the ids of those whose pictures it begins with, separated by blanks.
        `note` is a key that is the request's own: tried again under the same one, it is counted once.
        """
        return self._ask(tenant, jobs, most_open, most_work, note=note, parents=parents)

    def admit_of_run(
        self,
        tenant: str,
        run: str,
        first: int,
        jobs: Sequence[tuple[str, int]],
        *,
        most_open: int | None,
        most_work: int | None,
    ) -> Admission:
        """Admit as many of a run's next jobs as may be sent now. `first`: the number of the first of them."""
        return self._ask(tenant, jobs, most_open, most_work, run=run, first=first)

    def give_back(self, tenant: str, jobs: Sequence[tuple[str, int]], note: str = "") -> None:
        """Take back what `admit` has just counted: none of the jobs was sent."""
        day = str(int(self._redis.time()[0]) // 86_400)
        with self._redis.pipeline() as pipe:
            pipe.hincrby(f"{HTTP_SPENT}{tenant}", day, -sum(work for _, work in jobs))
            pipe.expire(f"{HTTP_SPENT}{tenant}", 2 * 86_400)
            # To be looked at next: those that are open by another submission stay.
            for name in (f"{HTTP_OPEN}{tenant}", f"{HTTP_OPEN}{tenant}:waiting"):
                pipe.zadd(name, {job_id: 0 for job_id, _ in jobs}, xx=True)
            if note:
                pipe.delete(note)
            pipe.execute()

    def _ask(
        self,
        tenant: str,
        jobs: Sequence[tuple[str, int]],
        most_open: int | None,
        most_work: int | None,
        *,
        run: str = "",
        first: int = 0,
        note: str = "",
        parents: Sequence[str] = (),
    ) -> Admission:
        keys = [f"{begin}{tenant}" for begin in (HTTP_SPENT, HTTP_OPEN, HTTP_FEEDING)] + (
            [note] if note else []
        )
        limits = ["" if each is None else each for each in (most_open, most_work)]
        args: list[str | int] = [*limits, self._ttl_s, run, first, 0 if run else 1, NOTE_S]
        for job, begins_with in zip(jobs, parents or [""] * len(jobs), strict=True):
            args += [*job, begins_with]
        admitted, is_open, spent, left_s, stopped = self._admit(keys=keys, args=args)
        return Admission(int(admitted), int(is_open), int(spent), max(1, int(left_s)), str(stopped))
