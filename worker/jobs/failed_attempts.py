"""Records how an attempt failed, and says what becomes of its message."""

from __future__ import annotations

import logging
import random
import time

from worker.contract.errors import SmallcatError
from worker.contract.record import Attempt
from worker.jobs import job_log, metrics
from worker.jobs.retry_policy import RetryPolicy, Verdict
from worker.state.records import Records


class FailedAttempts:
    """Those of the worker `name`. Thread-safe."""

    def __init__(self, name: str, records: Records, policy: RetryPolicy) -> None:
        self._name, self._records, self._policy = name, records, policy

    def settle(
        self, job_id: str, message_id: str, attempt: int, error: SmallcatError, *, alone: bool
    ) -> float | None:
        """Record that an attempt failed. Returns seconds until the next one; None: it was the last.

        `alone`: no other job ran here meanwhile. Raises `error` where the message must go back to the queue.
        """
        name, text = type(error).__name__, str(error)
        at = time.time()
        failure = Attempt(attempt=attempt, worker=self._name, at=at, error_type=name, error=text)
        match self._policy.verdict(error, attempt, alone=alone):
            case Verdict.GIVE_BACK:
                self._records.give_back(job_id, message_id)
                metrics.JOBS.labels("given_back", name).inc()
                raise error
            case Verdict.SUSPECT | Verdict.DEATH as verdict:
                counted = failure if verdict is Verdict.DEATH else None
                self._records.give_back(job_id, message_id, counted, died=True)
                metrics.JOBS.labels("given_back", name).inc()
                raise error
            case Verdict.RETRY:
                self._records.give_back(job_id, message_id, failure)
                metrics.JOBS.labels("retried", name).inc()
                job_log.failed(job_id, attempt, error, logging.WARNING)
                return self._policy.pause_s(attempt, random.random())  # noqa: S311 - nothing secret
            case Verdict.CANCEL:
                if not self._records.cancelled(job_id, message_id, error):
                    # It was submitted again while this render was being stopped.
                    self._records.give_back(job_id, message_id)
                    metrics.JOBS.labels("given_back", name).inc()
                    return 0.0
                metrics.JOBS.labels("cancelled", "").inc()
                job_log.failed(job_id, attempt, error, logging.INFO)
            case Verdict.FAIL:
                self._records.failed(job_id, message_id, error)
                metrics.JOBS.labels("failed", name).inc()
                job_log.failed(job_id, attempt, error, logging.ERROR)
        return None
