"""The connection to Redis: the only door to redis-py. Imported when first needed, for it takes a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from kombu.exceptions import OperationalError
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from worker.errors import QueueError
from worker.settings import hidden

#: Seconds between two tries to reach Redis.
RETRY_EVERY_S = 0.25


def connect(redis_url: str, retry_s: float) -> redis.Redis:
    """A Redis client, thread-safe, not yet connected.

    A command whose connection is lost is sent again for about `retry_s` seconds; so only commands that may
    be sent twice go through it.
    """
    return redis.Redis.from_url(
        redis_url,
        decode_responses=True,
        socket_connect_timeout=min(5.0, max(1.0, retry_s)),
        socket_timeout=min(10.0, max(1.0, retry_s)),
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(ConstantBackoff(RETRY_EVERY_S), int(retry_s / RETRY_EVERY_S)),
    )


@contextmanager
def queue_errors(redis_url: str) -> Iterator[None]:
    """Turn what redis-py or kombu raises inside into one `QueueError` with the cause and the remedy."""
    where = hidden(redis_url)
    try:
        try:
            yield
        except OperationalError as error:  # kombu's wrapping of the errors below
            raise error.__cause__ or redis.ConnectionError(str(error)) from None
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise QueueError(f"Redis at {where} refuses the password ({error}): check REDIS_URL.") from error
    except redis.exceptions.OutOfMemoryError as error:
        raise QueueError(f"Redis at {where} is full ({error}): wait for workers to drain it.") from error
    except redis.exceptions.ReadOnlyError as error:
        raise QueueError(f"Redis at {where} is read-only ({error}): use the primary's address.") from error
    except (redis.RedisError, ConnectionError) as error:
        raise QueueError(
            f"Redis at {where} is out of reach ({error}): start it, or set REDIS_URL."
        ) from error
