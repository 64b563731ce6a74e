"""The services that a worker needs, Redis and the bucket: waited for at its start, asked later on."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from worker.contract.choices import ImageFormat
from worker.contract.errors import PermanentStorageError, QueueError, ServiceError
from worker.contract.settings import WorkerSettings
from worker.state.redis_client import check, may_come, queue_errors
from worker.storage.bucket import Bucket
from worker.storage.options import BucketOptions

logger = logging.getLogger("smallcat.worker")

T = TypeVar("T")

#: Seconds between two tries to reach Redis or the bucket at the start.
START_RETRY_S = 0.5
#: Where no job's picture is: an id has as many digits, but none hashes to this one.
NO_JOB = hashlib.sha256(b"readiness").hexdigest()


def wait_for_both(settings: WorkerSettings) -> None:
    """Wait a while until Redis and the bucket answer, and log what the bucket lacks.

    Raises `ServiceError`.
    """
    until_s = time.monotonic() + settings.start_timeout_s

    def redis() -> None:
        with queue_errors(settings.redis_url):
            check(settings.redis_url)

    wait_for(redis, until_s)
    where, options = (settings.s3_bucket, settings.s3_prefix), BucketOptions.of(settings)
    for lack in wait_for(Bucket(*where, attempts=2, options=options).check, until_s):
        logger.warning("storage: %s", lack)


def wait_for(ask: Callable[[], T], until_s: float) -> T:
    """What `ask` returns; it is asked again while its service is out of reach, until `until_s`, monotonic."""
    is_logged = False
    while True:
        try:
            return ask()
        except ServiceError as error:
            lasts = isinstance(error, PermanentStorageError)
            if isinstance(error, QueueError):
                lasts = not may_come(error)
            if lasts or time.monotonic() + START_RETRY_S > until_s:
                raise
            if not is_logged:
                left_s = until_s - time.monotonic()
                logger.warning("waits for %.0f s (SMALLCAT_START_TIMEOUT_S): %s", left_s, error)
            is_logged = True
            time.sleep(START_RETRY_S)


def not_ready(redis_url: str, bucket: Bucket, refused: Callable[[], str]) -> str:
    """Why the services do not let a worker work; empty where they do.

    `refused` returns why the bucket refuses the worker at present, or nothing. Blocks for as long as the
    bucket's requests are tried again.
    """
    try:
        with queue_errors(redis_url):
            check(redis_url)
        bucket.find(NO_JOB, ImageFormat.PNG)
    except ServiceError as error:
        return str(error)
    return refused()
