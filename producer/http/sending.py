"""Sends the jobs of many requests together: one thread, and one round trip for all that wait.

    request ─► checked job ─► queue ─► thread: records and messages of all that wait, in one pipeline

Checking and encoding take `producer.ingest.message_templates`, as prompt files do. What the workers serve is
read again every second, while requests go on with what was read before.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import secrets
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from producer.http.problems import RETRY_S, RefusedError
from producer.ingest.message_templates import JobTemplates, MessageTemplate, TemplatedJob, resolver_of
from producer.session import Session
from worker.contract.errors import InvalidJobError, QueueError
from worker.contract.input_reference import jobs_of
from worker.contract.job import SUBMISSION_FIELDS
from worker.contract.message import Route
from worker.contract.refusals import sentence, too_few_replicas
from worker.state.submissions import Submission, Submissions, said
from worker.tracing.submissions import NO_SPAN, SentSpan

logger = logging.getLogger("smallcat.http")

#: Jobs that are sent in one round trip, and jobs that may wait for theirs.
AT_ONCE, MAX_WAITING = 200, 20_000
#: Seconds after which what the workers serve is read again, and those for which nobody waits for that.
FRESH_S, STALE_S = 1.0, 2.0
#: Seconds between two tries.
_RETRY_EVERY_S: Final = 0.2


@dataclass(frozen=True)
class Ready:
    """A checked and resolved job, and what its submission is to have."""

    job: TemplatedJob
    submission: str
    #: Whose submission it is: in that tenant's list of jobs.
    tenant: str
    #: Its webhook, as `worker.contract.webhook.hook_of` makes it; empty: it has none.
    hook: str = ""
    #: Its span; its webhook is to say it, too.
    span: SentSpan = NO_SPAN


class _Request:
    """The jobs that one caller waits for."""

    def __init__(self, jobs: Sequence[Ready]) -> None:
        self.left = list(jobs)
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()

    def finish(self) -> None:
        """Wake the caller, from any thread."""

        def wake() -> None:
            if not self.done.done():
                if self.error is None:
                    self.done.set_result(None)
                else:
                    self.done.set_exception(self.error)

        try:
            self._loop.call_soon_threadsafe(wake)
        except RuntimeError:
            return  # The loop has ended, and with it the request.


class Sender:
    """Checks jobs and sends them. One for a server process."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._waiting = 0
        self._templates: JobTemplates | None = None
        #: Names and revisions of the models that workers serve, or served last: since `templates` was called.
        self.served: frozenset[tuple[str, str]] = frozenset()
        self._fresh_until_s = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        self._messages: dict[Route, MessageTemplate] = {}
        self._tag, self._tags = str(uuid.uuid4())[:24], 0
        self._thread = threading.Thread(target=self._run, name="http sender", daemon=True)
        self._thread.start()

    async def templates(self) -> JobTemplates:
        """What checks jobs and resolves them by what the workers serve. Raises `QueueError`."""
        late_s = time.monotonic() - self._fresh_until_s
        if late_s >= 0 and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._refresh(), name="smallcat fleet")
            # Looked at, or asyncio would log that nobody has: whoever waits gets it.
            self._refreshing.add_done_callback(lambda task: task.cancelled() or task.exception())
        if self._templates is None or late_s > STALE_S:
            assert self._refreshing is not None  # noqa: S101 - it is late
            await asyncio.shield(self._refreshing)
        assert self._templates is not None  # noqa: S101 - refreshed just now
        return self._templates

    async def _refresh(self) -> None:
        snapshot = await asyncio.to_thread(self._snapshot)
        self._templates = JobTemplates(resolver_of(snapshot))
        groups = (*snapshot.live, *snapshot.last_seen)
        self.served = frozenset((each.served.name, each.served.revision) for each in groups)
        self._fresh_until_s = time.monotonic() + FRESH_S

    async def send(self, jobs: Sequence[Ready]) -> None:
        """Send jobs; returns when all are in Redis. Raises `QueueError`, `RefusedError`.

        After an error some may have been sent. Sending a submission again counts it once.
        """
        if self._waiting + len(jobs) > MAX_WAITING:
            raise RefusedError(
                503,
                f"{self._waiting:,} jobs wait to be sent to Redis: try again later.",
                code="Overloaded",
                headers={"Retry-After": str(RETRY_S)},
            )
        request = _Request(jobs)
        self._waiting += len(jobs)
        try:
            self._requests.put(request)
            await request.done
        finally:
            self._waiting -= len(jobs)

    def close(self) -> None:
        """End when all that waits is sent."""
        self._requests.put(None)
        self._thread.join()

    def _snapshot(self) -> Any:
        with self._session.queue_errors():
            return self._session.fleet.snapshot()

    def _run(self) -> None:
        submissions = Submissions(self._session.redis, self._session.settings.record_ttl_s)
        is_open = True
        while is_open:
            requests = [self._requests.get()]
            size = len(requests[0].left) if requests[0] else 0
            while size < AT_ONCE:
                try:
                    requests.append(self._requests.get_nowait())
                except queue.Empty:
                    break
                size += len(requests[-1].left) if requests[-1] else 0
            is_open = None not in requests
            todo = [each for each in requests if each is not None]
            try:
                self._send(submissions, todo)
            except Exception as error:  # noqa: BLE001 - each of them waits for its answer
                for request in todo:
                    request.error = request.error or error
            for request in todo:
                request.finish()

    def _send(self, submissions: Submissions, requests: Sequence[_Request]) -> None:
        """Send the jobs of several requests, again and again while Redis is out of reach."""
        settings = self._session.settings
        replicas, wait_s = settings.wait_replicas, 0.8 * self._session.redis_retry_s
        deadline_s = time.monotonic() + self._session.redis_retry_s
        todo = [(request, ready) for request in requests for ready in request.left]
        for start in range(0, len(todo), AT_ONCE):
            part = todo[start : start + AT_ONCE]
            while True:
                try:
                    with self._session.queue_errors(), self._session.one_retry(0):
                        # Other messages at each try: should both arrive, the second finds the job taken.
                        written = [self._write(ready) for _, ready in part]
                        refused, have_it = submissions.send(written, replicas, wait_s)
                    break
                except QueueError:
                    if time.monotonic() >= deadline_s:
                        raise
                    self._session.reconnect()
                    time.sleep(_RETRY_EVERY_S)
            for (request, ready), error in zip(part, refused, strict=True):
                if error is not None:
                    is_wrong = isinstance(error, InvalidJobError)
                    request.error = error if is_wrong else QueueError(sentence("", error))
                else:
                    _log_submitted(ready)
            if replicas and have_it < replicas:
                for request, _ in part:
                    request.error = request.error or QueueError(too_few_replicas(have_it, replicas))

    def _write(self, ready: Ready) -> Submission:
        job = ready.job
        template = self._message_template(job.route)
        message_id = f"{job.id}-{secrets.token_hex(4)}"
        self._tags += 1
        return Submission(
            job.id,
            job.job,
            job.route.queue,
            ready.submission,
            json.dumps(said(own_of(job)), separators=(",", ":")),
            message_id,
            template.list,
            template.fill(job, "", message_id, f"{self._tag}{self._tags:012x}", ready.span.headers),
            tenant=ready.tenant,
            hook=ready.span.on_hook(ready.hook),
            parents=jobs_of(job.shape.get("image"), job.shape.get("mask")),
        )

    def _message_template(self, route: Route) -> MessageTemplate:
        if route not in self._messages:
            from kombu.pools import producers

            from worker.celery import connection

            if len(self._messages) >= 1_000:
                self._messages.clear()
            pool = producers[connection(self._session.settings.redis_url)]
            with pool.acquire(block=True) as producer:
                self._messages[route] = MessageTemplate(route, producer)
        return self._messages[route]


def _log_submitted(ready: Ready) -> None:
    fields = {"submission": ready.submission, "queue": ready.job.route.queue}
    fields |= {"tenant": ready.tenant} if ready.tenant else {}
    about = {"job": ready.job.id, "trace": ready.span.trace}
    logger.info("Job %s is submitted.", ready.job.id, extra={**about, "fields": fields})


def own_of(job: TemplatedJob) -> Mapping[str, Any]:
    """The fields of a job that are its submission's own."""
    fields = {**job.shape, "metadata": job.metadata}
    return {name: fields[name] for name in SUBMISSION_FIELDS if name in fields}
