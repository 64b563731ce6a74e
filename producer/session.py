"""The buckets that this process reads, each with one client for all who ask. boto3 loads with the first."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from redis.client import Redis

    from worker.contract.settings import ProducerSettings
    from worker.state.fleet import Fleet
    from worker.state.records import Records
    from worker.storage.bucket import Bucket

#: Tries of a request: who asks waits, a few seconds and not the minute that a worker has.
ATTEMPTS = 4
#: Seconds that a feeder waits for a Redis that is away, before it says how to resume.
REDIS_RETRY_S = 60.0


def bucket(name: str, prefix: str = "") -> Bucket:
    """The bucket in the environment as it is now: when boto3's variables change, it is another one."""
    ours = tuple(sorted(each for each in os.environ.items() if each[0].startswith("AWS_")))
    return _made(name, prefix, ours)


def bucket_of(uri: str) -> Bucket:
    """The bucket that s3://bucket/key lies in."""
    return bucket(urlsplit(uri).netloc)


@functools.lru_cache(maxsize=16)
def _made(name: str, prefix: str, environment: tuple[tuple[str, str], ...]) -> Bucket:
    from worker.storage.bucket import Bucket

    return Bucket(name, prefix, attempts=ATTEMPTS)


@dataclass(frozen=True)
class Services:
    """What a feeder needs of the world."""

    settings: ProducerSettings
    redis: Redis
    records: Records
    fleet: Fleet
    #: None where S3_BUCKET is not set.
    storage: Bucket | None

    @classmethod
    def of_environment(cls) -> Services:
        """Those that the environment names, not yet connected. Raises `SettingsError`."""
        from worker.contract.settings import producer_settings
        from worker.state.fleet import Fleet
        from worker.state.records import Records
        from worker.state.redis_client import connect
        from worker.storage.bucket import Bucket

        settings = producer_settings()
        redis = connect(settings.redis_url, REDIS_RETRY_S)
        storage = Bucket(settings.s3_bucket, settings.s3_prefix) if settings.s3_bucket else None
        ttl_s = settings.record_ttl_s
        return cls(settings, redis, Records(redis, ttl_s), Fleet(redis, ttl_s), storage)

    def queue_errors(self) -> AbstractContextManager[None]:
        """Turns redis-py's errors into `QueueError`."""
        from worker.state.redis_client import queue_errors

        return queue_errors(self.settings.redis_url)
