"""Sends one job: its record and its message in one step, again and again while Redis is out of reach."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from typing import Final

from producer.session import Session
from worker.contract.errors import QueueError, UnknownJobError
from worker.contract.job import Job
from worker.contract.record import State
from worker.contract.webhook import WEBHOOK_SINCE
from worker.tracing.submissions import SentSpan, sending

#: Seconds for which `submit_job` goes by what it has read of the workers, where one of them serves the model.
#: Who submits hundreds of jobs a second need not ask for each: a worker may as well leave just afterwards.
WORKERS_AGE_S: Final = 0.05
#: Random bytes in a submission's id. With 7 of them its key takes 64 bytes of Redis, and not 80.
SUBMISSION_BYTES: Final = 7


def send(now: Session, job: Job, hook: str) -> tuple[Job, str]:
    """Enqueue `job`, with its webhook. Returns it as it was resolved, and its submission's id.

    Raises `QueueError`.
    """
    from worker.contract.queues import queue_of

    deadline = time.monotonic() + now.redis_retry_s
    with now.queue_errors(), now.one_retry():
        job = now.fleet.resolve(job, WORKERS_AGE_S)
    with sending(job.id, queue_of(job)) as span:
        return job, _sent(now, job, span.on_hook(hook), deadline, span)


def _sent(now: Session, job: Job, hook: str, deadline: float, span: SentSpan) -> str:
    """Enqueue a resolved job until `deadline`, monotonic seconds. Returns its submission's id."""
    from kombu.pools import producers

    from worker.celery import connection, message_of
    from worker.contract.found_message import digest_of
    from worker.contract.message import route_of, task_call_of
    from worker.contract.refusals import too_few_replicas

    replicas = now.settings.wait_replicas
    # Less than a client waits for an answer.
    wait_s = 0.8 * min(now.redis_retry_s, 10.0)
    pool = producers[connection(now.settings.redis_url)]
    submission, is_sent = secrets.token_hex(SUBMISSION_BYTES), False
    while True:
        try:
            # All of it again after a failure: a replica that became the primary may have none of it.
            if not (is_sent and _is_taken(now, job.id)):
                # Another one for each try: should both have arrived, the second finds the job taken.
                message_id, route = f"{job.id}-{secrets.token_hex(4)}", route_of(job)
                with now.queue_errors(), pool.acquire(block=True) as producer:
                    call = task_call_of(job, least=WEBHOOK_SINCE if hook else 1)
                    message = json.dumps(span.on(message_of(call, message_id, producer)))
                is_sent = True
                with now.queue_errors(), now.one_retry(deadline - time.monotonic()):
                    put = (route.list, message)
                    now.records.submitted(
                        job, route.queue, submission, message_id, digest_of(message), put, hook
                    )
            if replicas:
                # Once: a connection that is made anew may lead to another primary.
                with now.queue_errors(), now.one_retry(0):
                    have_it = now.records.replicated(job.id, submission, replicas, wait_s)
                if have_it < replicas:
                    raise QueueError(too_few_replicas(have_it, replicas))
            return submission
        except QueueError:
            if time.monotonic() >= deadline:
                raise
            now.reconnect()
            time.sleep(0.2)


def _is_taken(now: Session, job_id: str) -> bool:
    """Whether a job that may have arrived has: a worker has it, or has done it. Raises `QueueError`."""
    with now.queue_errors(), now.one_retry(0), contextlib.suppress(UnknownJobError):
        return now.records.get(job_id).state in (State.RUNNING, State.DONE)
    return False
