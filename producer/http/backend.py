"""What all requests of one server process share: Redis, the buckets, the sender of jobs, and threads.

redis-py and boto3 block, so what calls them runs in one of a bounded number of threads. Submissions go
another way (`sending`), and so do streams of events (`worker.state.following`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar, cast

from starlette.requests import Request

from producer.http import run_folder, run_queue
from producer.http.activity import Watching
from producer.http.key_store import KeyStore
from producer.http.limits import Limits
from producer.http.problems import RETRY_S, RefusedError
from producer.http.run_store import RunStore
from producer.http.sending import Sender
from producer.http.sessions import Sessions
from producer.http.streams import Streams
from producer.http.tenant_store import TenantStore
from producer.http.thumbnails import Thumbnails
from producer.http.waiting import Waiting
from producer.session import session
from worker.contract.errors import QueueError
from worker.contract.settings import ServerSettings
from worker.state.following import Following
from worker.state.tenant_limits import TenantLimits

logger = logging.getLogger("smallcat.http")

T = TypeVar("T")

#: Threads for what blocks, and calls that may wait for one.
THREADS, MAX_WAITING = 32, 1_000
#: Seconds that a request waits for a Redis that is away before it is answered by 503.
REDIS_RETRY_S: Final = 2.0


class Backend:
    """The shared parts of one server process. Made on its event loop; `close` ends all."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.session = session(min(REDIS_RETRY_S, settings.submit_timeout_s))
        self.keys = KeyStore(self.session.redis)
        self.sessions = Sessions(self.session.redis)
        self.sender = Sender(self.session)
        self.tenants = TenantStore(self.session.redis)
        self.limits = Limits(TenantLimits(self.session.redis, settings.record_ttl_s), self.run, self._length)
        self.waiting = Waiting()
        self._runs: RunStore | None = None
        self._finding: asyncio.Task[None] | None = None
        self.following = Following(self.session.settings.redis_url, REDIS_RETRY_S)
        self.watching = Watching(self.session, self.run)
        self.streams = Streams(settings.http_max_connections)
        self.thumbnails = Thumbnails()
        #: Held while a picture of a request is unpacked: a large one takes half a gigabyte meanwhile.
        self.unpacking = asyncio.Semaphore(2)
        #: Set when the server is to end: streams close, and nothing new is begun.
        self.draining = asyncio.Event()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="http")
        self._waiting = 0

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call what blocks in a thread. Raises its errors, `QueueError` for redis-py's, `RefusedError`."""

        context = contextvars.copy_context()

        def call() -> T:
            with self.session.queue_errors():
                return context.run(function, *arguments)

        if self._waiting >= MAX_WAITING:
            raise RefusedError(
                503,
                f"{MAX_WAITING:,} requests wait for Redis or the bucket: try again later.",
                code="Overloaded",
                headers={"Retry-After": str(RETRY_S)},
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        finally:
            self._waiting -= 1

    @property
    def runs(self) -> RunStore:
        """This queue's runs. Raises `QueueError` until Redis has said which queue it is."""
        if self._runs is None:
            raise QueueError("Redis has been out of reach since the server started: try again later.")
        return self._runs

    async def find_runs(self) -> None:
        """Go on with this queue's runs, as soon as Redis is there. Raises `SettingsError`, `OSError`."""
        try:
            await self.run(self._open_runs)
        except QueueError as error:
            logger.warning("The runs of prompt files wait: %s", error)
            self._finding = asyncio.create_task(self._find_runs_later(), name="smallcat runs")

    async def _find_runs_later(self) -> None:
        while self._runs is None:
            await asyncio.sleep(REDIS_RETRY_S)
            with contextlib.suppress(QueueError, RefusedError):
                await self.run(self._open_runs)

    def _open_runs(self) -> None:
        redis, data, ttl_s = self.session.redis, run_folder.chosen(self.settings), self.settings.record_ttl_s
        folder = run_queue.folder_of(data, run_queue.name_of(redis))

        def knows(run: str) -> bool:
            with self.session.queue_errors():
                return run_queue.knows(redis, run)

        runs = RunStore(folder, ttl_s, run_queue.EarlierRuns(data, folder, ttl_s, knows).take_over)
        runs.resume()
        self._runs = runs

    def _length(self, queue: str, tenant: str) -> int:
        return self.session.fleet.length(queue, tenant=tenant)

    async def close(self) -> None:
        """End all parts. What was sent is in Redis."""
        self.draining.set()
        if self._finding is not None:
            self._finding.cancel()
        if self._runs is not None:
            self._runs.close()
        await self.following.close()
        await self.watching.close()
        await asyncio.to_thread(self.sender.close)
        self._threads.shutdown(wait=False, cancel_futures=True)


def backend_of(request: Request) -> Backend:
    """The backend of a request's server."""
    return cast(Backend, request.app.state.backend)
