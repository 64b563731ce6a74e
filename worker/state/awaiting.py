"""Waiting for jobs on an event loop, as `Records.wait` does in a thread.

All waits of one event loop share one subscription and one connection for reading, whatever their number.
Both are opened for the first wait and closed with the last one, so that nothing outlives an event loop, and a
wait that is cancelled leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from worker.contract.errors import UnknownJobError
from worker.contract.file_index import NO_FILES
from worker.contract.queues import Takers
from worker.contract.record import JobRecord
from worker.state.file_indexes import index_in
from worker.state.groups import WorkerInfo, groups_in, groups_of, takers
from worker.state.hashes import is_in_doubt, record_of, says_final, seen_by, unknown
from worker.state.keys import DIGEST, WORKERS, index_key, job_key, submission_key, worker_key
from worker.state.records import READ_AT_ONCE
from worker.state.redis_client import RETRY_EVERY_S, connect_async, is_lost

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.client import PubSub

_CHANNEL = job_key("")

#: Seconds after which all records are read again, in case an event was lost, and the workers are read.
RECHECK_S = 5.0


class Awaiting:
    """Lets the tasks of event loops wait for the jobs of one Redis. Thread-safe."""

    def __init__(self, redis_url: str, retry_s: float) -> None:
        self._redis_url, self._retry_s = redis_url, retry_s
        self._watches: dict[asyncio.AbstractEventLoop, _Watch] = {}

    async def wait(
        self,
        job_id: str,
        timeout_s: float | None,
        unserved: Callable[[JobRecord, Takers], None] = lambda *_: None,
        submission: str = "",
    ) -> JobRecord:
        """Wait until the job's state is final and return its record, as `Records.wait`.

        `unserved` is called once, within about 5 seconds, while no live worker takes the job: with the
        record, and who takes from its queue.
        Tries for `retry_s` seconds to reach a Redis that is away. Raises `TimeoutError` after `timeout_s`
        seconds (None: never), `UnknownJobError`, redis-py's errors.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        give_up_at: float | None = None
        while True:
            watch = self._watch(loop)
            waiter = watch.add(job_id, submission)
            try:
                return await _outcome(waiter, timeout_s, deadline, unserved)
            except Exception as error:
                if not is_lost(error):
                    raise
                if give_up_at is None or waiter.record is not None:
                    give_up_at = loop.time() + self._retry_s
                if loop.time() + RETRY_EVERY_S > give_up_at:
                    raise
            finally:
                watch.remove(waiter)
            await asyncio.sleep(RETRY_EVERY_S)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> _Watch:
        watch = self._watches.get(loop)
        if watch is None or watch.is_over:
            client = connect_async(self._redis_url, self._retry_s)
            self._watches[loop] = watch = _Watch(client, lambda: self._forget(loop))
        return watch

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        if (watch := self._watches.get(loop)) is not None and watch.is_over:
            del self._watches[loop]


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class _Waiter:
    """One wait for one job."""

    job_id: str
    #: Whose wait it is; empty: that of somebody who knows the job's id alone.
    submission: str
    #: The job's record, as it was read last; None: not yet.
    record: JobRecord | None = None
    #: Set when the record was read for the first time, or nothing will be read any more.
    read: asyncio.Event = field(default_factory=asyncio.Event)
    #: The job's final record, or why there is none.
    final: asyncio.Future[JobRecord] = field(default_factory=_future)
    #: Done when no live worker takes the job, with who takes from its queue.
    unserved: asyncio.Future[Takers] = field(default_factory=_future)


async def _outcome(
    waiter: _Waiter,
    timeout_s: float | None,
    deadline: float | None,
    unserved: Callable[[JobRecord, Takers], None],
) -> JobRecord:
    """The waiter's final record. A job that is done is returned although `deadline` has passed."""
    loop = asyncio.get_running_loop()
    await waiter.read.wait()
    pending: set[asyncio.Future[Any]] = {waiter.final, waiter.unserved}
    while not waiter.final.done():
        left_s = None if deadline is None else max(0.0, deadline - loop.time())
        done, pending = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            state = waiter.record.state if waiter.record else "unknown"
            raise TimeoutError(f"Job {waiter.job_id} is still {state} after {timeout_s:g} s.")
        if waiter.unserved in done and waiter.record is not None:
            unserved(waiter.record, waiter.unserved.result())
    return waiter.final.result()


class _Watch:
    """The jobs that one event loop waits for."""

    def __init__(self, client: Redis, on_end: Callable[[], None]) -> None:
        self._client, self._on_end = client, on_end
        self._waiters: dict[str, set[_Waiter]] = {}
        #: Jobs whose channels are subscribed to, and jobs whose records are to be read.
        self._subscribed: set[str] = set()
        self._to_read: set[str] = set()
        self._changed = asyncio.Event()
        #: Whether it takes no more waiters.
        self.is_over = False
        self._task = asyncio.create_task(self._run(), name="smallcat jobs")
        self._task.add_done_callback(self._end)

    def add(self, job_id: str, submission: str) -> _Waiter:
        """Begin to watch a job for one more waiter."""
        waiter = _Waiter(job_id, submission)
        self._waiters.setdefault(job_id, set()).add(waiter)
        if job_id in self._subscribed:
            self._to_read.add(job_id)
        self._changed.set()
        return waiter

    def remove(self, waiter: _Waiter) -> None:
        """End a wait. With the last one all connections are closed."""
        waiters = self._waiters.get(waiter.job_id, set())
        waiters.discard(waiter)
        if waiter.final.done() and not waiter.final.cancelled():
            waiter.final.exception()  # Retrieved, or asyncio would log that it never was.
        if not waiters:
            self._waiters.pop(waiter.job_id, None)
            self._changed.set()
        if not self._waiters and not self.is_over:
            self.is_over = True
            self._on_end()
            self._task.cancel()

    async def _run(self) -> None:
        async with self._client, self._client.pubsub() as channels:
            await channels.connect()
            receiving = asyncio.create_task(self._receive(channels))
            receiving.add_done_callback(lambda _: self._changed.set())
            try:
                await self._serve(channels, receiving)
            finally:
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)

    def _end(self, task: asyncio.Task[None]) -> None:
        """Pass on to those who wait what ended the watch: they may begin another one."""
        self.is_over = True
        self._on_end()
        error = None if task.cancelled() else task.exception()
        for waiters in self._waiters.values():
            for waiter in waiters:
                if error is None:
                    waiter.final.cancel()
                elif not waiter.final.done():
                    waiter.final.set_exception(error)
                waiter.read.set()

    async def _receive(self, channels: PubSub) -> None:
        """Note which jobs have changed, or were subscribed to just now."""
        while True:
            message = await channels.get_message(timeout=None)
            if message is None or message["type"] not in ("subscribe", "message"):
                continue
            if message["type"] == "subscribe" or says_final(message["data"]):
                self._to_read.add(str(message["channel"]).removeprefix(_CHANNEL))
                self._changed.set()

    async def _serve(self, channels: PubSub, receiving: asyncio.Task[None]) -> None:
        """Subscribe, unsubscribe and read as needed; read all every 5 seconds, in case an event was lost."""
        loop = asyncio.get_running_loop()
        recheck_at = loop.time() + RECHECK_S
        # A cancellation alone may be lost: in `asyncio.wait_for` of Python 3.11, which redis-py uses.
        while not self.is_over:
            if receiving.done():
                receiving.result()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(recheck_at):
                    await self._changed.wait()
            self._changed.clear()
            wanted = set(self._waiters)
            if gone := self._subscribed - wanted:
                await channels.unsubscribe(*map(job_key, gone))
            if new := wanted - self._subscribed:
                await channels.subscribe(*map(job_key, new))
            self._subscribed = wanted
            if loop.time() >= recheck_at:
                self._to_read |= wanted
                await self._find_unserved()
                recheck_at = loop.time() + RECHECK_S
            await self._read()

    async def _read(self) -> None:
        """Read the records of jobs that may have changed."""
        ids, self._to_read = sorted(self._to_read & self._waiters.keys()), set()
        for start in range(0, len(ids), READ_AT_ONCE):
            part = ids[start : start + READ_AT_ONCE]
            async with self._client.pipeline(transaction=False) as pipe:
                for job_id in part:
                    _ = pipe.hgetall(job_key(job_id))
                found: list[object] = await pipe.execute(raise_on_error=False)
            records = dict(zip(part, found, strict=True))
            given_up = await self._read_in_doubt(records)
            for job_id, fields in records.items():
                self._tell(job_id, fields, given_up)

    async def _read_in_doubt(self, records: Mapping[str, object]) -> dict[_Waiter, str | None]:
        """The texts of those submissions whose records do not say that they are wanted still."""
        waiters = [
            waiter
            for job_id, fields in records.items()
            if isinstance(fields, dict)
            for waiter in self._waiters.get(job_id, ())
            if is_in_doubt(fields, waiter.submission)
        ]
        if not waiters:
            return {}
        async with self._client.pipeline(transaction=False) as pipe:
            for waiter in waiters:
                _ = pipe.get(submission_key(waiter.job_id, waiter.submission))
            texts: list[object] = await pipe.execute(raise_on_error=False)
        return {
            waiter: text if isinstance(text, str) else None
            for waiter, text in zip(waiters, texts, strict=True)
        }

    def _tell(self, job_id: str, fields: object, given_up: Mapping[_Waiter, str | None]) -> None:
        record: JobRecord | UnknownJobError
        try:
            if not isinstance(fields, dict) or "job" not in fields:
                raise unknown(job_id)
            record = record_of(job_id, fields)
        except UnknownJobError as error:
            record = error
        for waiter in self._waiters.get(job_id, ()):
            waiter.record = None if isinstance(record, UnknownJobError) else record
            if waiter.final.done():
                continue
            if isinstance(record, UnknownJobError):
                waiter.final.set_exception(record)
            elif (seen := seen_by(given_up.get(waiter), record)).state.is_final:
                waiter.final.set_result(seen)
            waiter.read.set()

    async def _find_unserved(self) -> None:
        """Mark the waiters whose jobs no live worker takes."""
        groups = groups_in(await self._client.get(DIGEST))
        if groups is None:  # As `Fleet.groups`.
            names = sorted(str(name) for name in await self._client.smembers(WORKERS))
            texts = await self._client.mget([worker_key(name) for name in names]) if names else []
            groups = groups_of(WorkerInfo.model_validate_json(text) for text in texts if text is not None)
        left = [
            waiter
            for waiters in self._waiters.values()
            for waiter in waiters
            if waiter.record is not None and not waiter.unserved.done()
        ]
        has_files = any(waiter.record and waiter.record.job.file_hashes for waiter in left)
        digests = sorted({group.files for group in groups if group.files}) if has_files else []
        texts = await self._client.mget([index_key(digest) for digest in digests]) if digests else []
        indexes = {digest: index_in(text, digest) for digest, text in zip(digests, texts, strict=True)}
        for waiter in left:
            if waiter.record is None:
                continue
            record = waiter.record
            found = takers(groups, record.queue, record.job, lambda digest: indexes.get(digest, NO_FILES))
            if not found.workers:
                waiter.unserved.set_result(found)
