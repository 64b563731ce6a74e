"""The session: Redis and the buckets that this process' environment names, for all who submit and read.

`session()` is the one way to it. redis-py and boto3 load when first needed, and nothing is connected before.
"""

from __future__ import annotations

import functools
import os
import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from worker.contract.settings import ProducerSettings, producer_settings
from worker.storage.options import BucketOptions

if TYPE_CHECKING:
    from redis.client import Redis

    from worker.state.awaiting import Awaiting
    from worker.state.failures import Failures
    from worker.state.fleet import Fleet
    from worker.state.records import Records
    from worker.storage.bucket import Bucket

#: Tries of a request to a bucket: somebody waits for it, so a few seconds and not the minute a worker has.
ATTEMPTS = 4
#: Seconds that a feeder tries to reach Redis before it gives up. A run that takes hours outlives a restart.
FEEDER_RETRY_S = 60.0

#: boto3's own variables, as sorted (name, value) pairs.
_Variables = tuple[tuple[str, str], ...]

#: Held while a session or a bucket is made, so that there is one of each.
_lock = threading.Lock()


class Session:
    """One Redis and the buckets, as a producer sees them. Thread-safe."""

    def __init__(self, settings: ProducerSettings, redis_retry_s: float, variables: _Variables) -> None:
        self.settings = settings
        #: Seconds that a command is sent again while Redis is out of reach.
        self.redis_retry_s = redis_retry_s
        self._variables = variables

    @functools.cached_property
    def redis(self) -> Redis:
        """The client of `REDIS_URL`."""
        from worker.state.redis_client import connect

        return connect(self.settings.redis_url, self.redis_retry_s)

    @functools.cached_property
    def records(self) -> Records:
        """The jobs' records."""
        from worker.state.records import Records

        return Records(self.redis, self.settings.record_ttl_s)

    @functools.cached_property
    def awaiting(self) -> Awaiting:
        """Waits for jobs on event loops."""
        from worker.state.awaiting import Awaiting

        return Awaiting(self.settings.redis_url, self.redis_retry_s)

    @functools.cached_property
    def failures(self) -> Failures:
        """The jobs that failed for good."""
        from worker.state.failures import Failures

        return Failures(self.redis)

    @functools.cached_property
    def fleet(self) -> Fleet:
        """The workers."""
        from worker.state.fleet import Fleet

        return Fleet(self.redis, self.settings.record_ttl_s)

    @property
    def bucket(self) -> Bucket | None:
        """The bucket of `S3_BUCKET` and `S3_PREFIX`; None where that is not set."""
        return self.bucket_named(self.settings.s3_bucket) if self.settings.s3_bucket else None

    def bucket_named(self, name: str) -> Bucket:
        """The bucket of that name. Each has one client, whoever asks."""
        prefix = self.settings.s3_prefix if name == self.settings.s3_bucket else ""
        with _lock:
            return _bucket(name, prefix, BucketOptions.of(self.settings), self._variables)

    def bucket_of(self, uri: str) -> Bucket:
        """The bucket that s3://bucket/key lies in."""
        return self.bucket_named(urlsplit(uri).netloc)

    def queue_errors(self) -> AbstractContextManager[None]:
        """Turns redis-py's and kombu's errors into `QueueError`."""
        from worker.state.redis_client import queue_errors

        return queue_errors(self.settings.redis_url)

    def one_retry(self, seconds: float | None = None) -> AbstractContextManager[object]:
        """All commands inside together are sent again for at most `seconds`; None: `redis_retry_s`."""
        from worker.state.redis_client import within

        return within(self.redis_retry_s if seconds is None else seconds)


def session(redis_retry_s: float | None = None) -> Session:
    """The session for the environment as it is now; a changed one gets a session of its own.

    `redis_retry_s` is how many seconds a command is sent again while Redis is out of reach; not given:
    `SMALLCAT_SUBMIT_TIMEOUT_S`. Raises `SettingsError`.
    """
    settings = producer_settings()
    variables = tuple(sorted(each for each in os.environ.items() if each[0].startswith("AWS_")))
    retry_s = settings.submit_timeout_s if redis_retry_s is None else redis_retry_s
    with _lock:
        return _session(settings, retry_s, variables)


@functools.lru_cache(maxsize=8)
def _session(settings: ProducerSettings, redis_retry_s: float, variables: _Variables) -> Session:
    return Session(settings, redis_retry_s, variables)


@functools.lru_cache(maxsize=16)
def _bucket(name: str, prefix: str, options: BucketOptions, variables: _Variables) -> Bucket:
    """`variables` are part of the key alone: boto3 reads the environment."""
    from worker.storage.bucket import Bucket

    return Bucket(name, prefix, attempts=ATTEMPTS, options=options)
