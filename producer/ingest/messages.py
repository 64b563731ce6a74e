"""The messages of a run's jobs, each with an id and a delivery tag of its own, and with its span."""

from __future__ import annotations

import uuid

from producer.ingest.message_templates import MessageTemplate, TemplatedJob
from producer.ingest.plan import Planned
from producer.ingest.sent import Sent
from producer.session import Session
from worker.contract.input_reference import jobs_of
from worker.contract.message import Route, RunMark
from worker.tracing.submissions import SentSpan, send_span


class Messages:
    """Writes messages for one process."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._templates: dict[Route, MessageTemplate] = {}
        self._tag, self._tags = tag_of_process(), 0
        self._spans: list[SentSpan] = []

    @property
    def queues(self) -> set[str]:
        """The queues that they were written for."""
        return {route.queue for route in self._templates}

    def of(self, job: Planned, run: str, number: int, at: int, again: str = "") -> Sent:
        """The message of job `number` of a run. Each has an id of its own, for its claim.

        `at`: Unix seconds by Redis' clock. `again` makes the id another one, where the job is sent again.
        """
        template = self._template(job.templated)
        self._tags += 1
        span = send_span(job.templated.id, job.templated.route.queue, is_root=True)
        self._spans.append(span)
        mark = RunMark(run, number, job.file, job.line, at).encode()
        message = template.fill(
            job.templated,
            mark,
            f"{job.templated.id}-{run}-{number}{again}",
            f"{self._tag}{self._tags:012x}",
            span.headers,
        )
        shape = job.templated.shape
        parents = jobs_of(shape["image"], shape.get("mask")) if shape.get("image") else ()
        if not parents:
            return Sent(template.list, message)
        route = job.templated.route
        return Sent(template.list, message, parents, job.templated.id, job.templated.job, route.queue, mark)

    def sent(self) -> None:
        """All that were written are in Redis: their spans end."""
        for span in self._spans:
            span.end()
        self._spans.clear()

    def _template(self, templated: TemplatedJob) -> MessageTemplate:
        if templated.route not in self._templates:
            from kombu.pools import producers

            from worker.celery import connection

            pool = producers[connection(self._session.settings.redis_url)]
            with pool.acquire(block=True) as producer:
                self._templates[templated.route] = MessageTemplate(templated.route, producer)
        return self._templates[templated.route]


def tag_of_process() -> str:
    """The first 24 characters of delivery tags, in the form of a UUID, which no other process has."""
    return str(uuid.uuid4())[:24]
