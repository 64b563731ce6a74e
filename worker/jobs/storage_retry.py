"""Requests to the bucket, repeated while it fails in a way that may pass."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from worker.contract.errors import PermanentStorageError, StorageError
from worker.jobs.bucket_access import BucketAccess
from worker.jobs.in_flight import JobsInFlight
from worker.jobs.retry_policy import Backoff

logger = logging.getLogger("smallcat.jobs")

T = TypeVar("T")

#: Between two tries of a request.
STORAGE_BACKOFF = Backoff(0.5, 10.0)
#: Times that a request is refused, while test objects are taken, until it counts as refused. A policy that
#: has just changed reaches the servers of S3 one after the other.
REFUSALS = 3


class StorageRetry:
    """Repeats a job's requests to the bucket, with the picture in memory, for a limited time.

    `access`: tells a refusal of one object from a refusal of all. `timeout_s`: seconds, > 0:
    `SMALLCAT_UPLOAD_TIMEOUT_S`.
    """

    def __init__(self, in_flight: JobsInFlight, access: BucketAccess, timeout_s: float) -> None:
        self._in_flight = in_flight
        self._access = access
        self._timeout_s = timeout_s

    def __call__(self, job_id: str, request: Callable[[], T], size: int = 0) -> T:
        """The result of `request`, which puts up to `size` bytes in an object.

        Raises `PermanentStorageError` where this request alone is refused, `BucketRefusedError` where all
        are, `StorageError` when the time is over, `JobCancelledError` and `EngineStoppedError` instead of
        another try.
        """
        deadline_s = time.monotonic() + self._timeout_s
        failures = refusals = 0
        while True:
            self._in_flight.check(job_id)
            try:
                return self._judged(request, size)
            except PermanentStorageError:
                failures += 1
                refusals += 1
                if refusals == REFUSALS:
                    raise
            except StorageError as error:
                failures += 1
                if time.monotonic() + STORAGE_BACKOFF.pause_s(failures) > deadline_s:
                    limit = f"{self._timeout_s:g} s (SMALLCAT_UPLOAD_TIMEOUT_S)"
                    raise StorageError(f"The storage failed for {limit}: {error}") from error
                logger.warning("Job %s waits for the storage: %s", job_id, error)
            chance = random.random()  # noqa: S311 - nothing secret
            self._in_flight.wait(job_id, STORAGE_BACKOFF.jittered_s(failures, chance))

    def _judged(self, request: Callable[[], T], size: int) -> T:
        """The result of `request`. Raises `PermanentStorageError` only where test objects are taken."""
        try:
            return request()
        except PermanentStorageError:
            self._access.judge(size)
            raise
