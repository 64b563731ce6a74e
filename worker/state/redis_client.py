"""The connection to Redis: the only door to redis-py. Imported when first needed, for it takes a while."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
from kombu.exceptions import OperationalError
from redis import RedisError as RedisError
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from worker.contract.errors import QueueError
from worker.contract.settings import hidden

T = TypeVar("T")

#: Seconds between two tries to reach Redis.
RETRY_EVERY_S = 0.25

#: Until when the calls of this thread may be tried again: monotonic seconds, or not set.
_patience = threading.local()


class _Patience(Retry):
    """Tries again for `retry_s` seconds in all, or until the end of `within`.

    redis-py nests its retries: that of a command holds those of its connection. Counted tries multiply, and
    each may last as long as a connect; so what is shared is the time. A refused password is refused again.
    """

    def __init__(self, retry_s: float) -> None:
        super().__init__(ConstantBackoff(RETRY_EVERY_S), -1)  # By time, not by count.
        self._retry_s = retry_s

    def call_with_retry(
        self,
        do: Callable[[], T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        """As redis-py's own, but for the above."""
        failures = 0
        with within(self._retry_s) as until_s:
            while True:
                try:
                    return do()
                except (redis.RedisError, TimeoutError) as error:
                    if not self._may_pass(error) or (is_retryable and not is_retryable(error)):
                        raise
                    failures += 1
                    fail(error, failures) if with_failure_count else fail(error)
                    if time.monotonic() + RETRY_EVERY_S > until_s or not self._pause():
                        raise

    def _may_pass(self, error: Exception) -> bool:
        return isinstance(error, self._supported_errors) and not isinstance(error, redis.AuthenticationError)

    def _pause(self) -> bool:
        """Wait until the next try. False: there is no point in one."""
        time.sleep(RETRY_EVERY_S)
        return True


class _Endurance(_Patience):
    """Tries again for as long as it takes, until `stop` is set.

    Also when Redis is there and refuses to write for now: a replica that has yet to become the primary, or
    one that is full, or whose disk is.
    """

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(math.inf)
        self._stop = stop

    def __deepcopy__(self, _: object) -> _Endurance:
        """Itself: redis-py copies it for each connection, and they all have one end."""
        return self

    def _may_pass(self, error: Exception) -> bool:
        refuses = isinstance(error, redis.exceptions.ReadOnlyError | redis.exceptions.OutOfMemoryError)
        return super()._may_pass(error) or refuses or str(error).startswith("MISCONF")

    def _pause(self) -> bool:
        return not self._stop.wait(RETRY_EVERY_S)


@contextmanager
def within(seconds: float) -> Iterator[float]:
    """Let the calls inside be tried again for so many seconds together; an outer one's end is kept."""
    outer = getattr(_patience, "until_s", math.inf)
    _patience.until_s = min(outer, time.monotonic() + seconds)
    try:
        yield _patience.until_s
    finally:
        _patience.until_s = outer


def connect(redis_url: str, retry_s: float) -> redis.Redis:
    """A Redis client, thread-safe, not yet connected.

    A command whose connection is lost is sent again for about `retry_s` seconds; so only commands that may
    be sent twice go through it.
    """
    return _client(redis_url, retry_s, _Patience(retry_s))


def connect_until(redis_url: str, stop: threading.Event) -> redis.Redis:
    """As `connect`, but a command that may work later is sent again until it does, or `stop` is set."""
    return _client(redis_url, math.inf, _Endurance(stop))


def _client(redis_url: str, retry_s: float, retry: Retry) -> redis.Redis:
    return redis.Redis.from_url(
        redis_url,
        decode_responses=True,
        socket_connect_timeout=min(5.0, max(1.0, retry_s)),
        socket_timeout=min(10.0, max(1.0, retry_s)),
        socket_keepalive=True,
        health_check_interval=10,
        # A thread that waits for a job has one to itself; redis-py would refuse the hundred and first.
        max_connections=2**31,
        retry=retry,
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
