"""The connection to Redis. Imported when first needed: redis-py takes a while to load."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import redis
import redis.asyncio
from kombu.exceptions import OperationalError
from redis import RedisError as RedisError
from redis.backoff import ConstantBackoff, NoBackoff
from redis.retry import Retry

from worker.contract.errors import QueueError
from worker.contract.redis_pool import async_pool, pool
from worker.contract.redis_url import RedisURL, hidden
from worker.contract.refusals import over, refusal_log, sentence

T = TypeVar("T")

#: Seconds between two tries to reach Redis.
RETRY_EVERY_S = 0.25

#: Until when the calls of this thread may be retried: monotonic seconds, or not set.
_deadline = threading.local()
#: How many retries of this thread are nested.
_nesting = threading.local()


class _RetryForSeconds(Retry):
    """Retries for `retry_s` seconds in all, or until the end of `within`.

    redis-py nests its retries: that of a command contains those of its connection. Retries that are counted
    multiply, and each may take as long as a connect; so all share one deadline. A wrong password is not
    retried.
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
                    if not self._is_transient(error) or (is_retryable and not is_retryable(error)):
                        raise
                    failures += 1
                    fail(error, failures) if with_failure_count else fail(error)
                    if time.monotonic() + RETRY_EVERY_S > until_s or not self._pause():
                        raise

    def _is_transient(self, error: Exception) -> bool:
        if isinstance(error, redis.AuthenticationError):
            return False
        return isinstance(error, self._supported_errors) or over(error) == "seconds"

    def _pause(self) -> bool:
        """Wait until the next try. False: there must be none."""
        time.sleep(RETRY_EVERY_S)
        return True


class _RetryUntilStopped(_RetryForSeconds):
    """Retries for as long as it takes, until `stop` is set.

    Also when Redis answers but refuses, for whatever reason that somebody can end: a job that waits for Redis
    has not failed. The first refusal and its end are logged.
    """

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(math.inf)
        self._stop = stop

    def __deepcopy__(self, _: object) -> _RetryUntilStopped:
        """Itself: redis-py copies it for each connection, but `stop` ends them all."""
        return self

    def call_with_retry(
        self,
        do: Callable[[], T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        """As its parent's. A connection that is made within a command is not yet an answer to it."""
        depth = getattr(_nesting, "depth", 0)
        _nesting.depth = depth + 1
        try:
            result = super().call_with_retry(do, fail, is_retryable, with_failure_count)
        finally:
            _nesting.depth = depth
        if depth == 0:
            refusal_log.answered(f"thread {threading.get_ident()}")
        return result

    def _is_transient(self, error: Exception) -> bool:
        if not isinstance(error, self._supported_errors) and over(error) in (None, "never"):
            return False
        refusal_log.refused(f"thread {threading.get_ident()}", error)
        return True

    def _pause(self) -> bool:
        return not self._stop.wait(RETRY_EVERY_S)


@contextmanager
def within(seconds: float) -> Iterator[float]:
    """Let the calls inside be retried for so many seconds in all; an outer deadline that is earlier holds."""
    outer = getattr(_deadline, "until_s", math.inf)
    _deadline.until_s = min(outer, time.monotonic() + seconds)
    try:
        yield _deadline.until_s
    finally:
        _deadline.until_s = outer


def connect(redis_url: str, retry_s: float) -> redis.Redis:
    """A Redis client, thread-safe, not yet connected.

    A command whose connection is lost is sent again for about `retry_s` seconds: use it only for commands
    that may be sent twice.
    """
    return _client(redis_url, retry_s, _RetryForSeconds(retry_s))


def connect_until(redis_url: str, stop: threading.Event, connections: int) -> redis.Redis:
    """As `connect`, but a command that may succeed later is sent again until it does, or `stop` is set.

    It has so many connections at most: threads take turns.
    """
    return _client(redis_url, math.inf, _RetryUntilStopped(stop), connections)


def _client(redis_url: str, retry_s: float, retry: Retry, connections: int | None = None) -> redis.Redis:
    return redis.Redis.from_pool(
        pool(
            redis_url,
            connections,
            **_socket(redis_url, retry_s),
            health_check_interval=10,
            # Each thread that waits for a job needs one; redis-py's default limit is 100.
            max_connections=2**31,
            retry=retry,
        )
    )


def _socket(redis_url: str, retry_s: float) -> dict[str, Any]:
    """How long a connection waits for Redis, and what else every client wants."""
    # Anybody may have written what is no UTF-8.
    text = {"decode_responses": True, "encoding_errors": "replace"}
    options = {**text, "socket_timeout": min(10.0, max(1.0, retry_s))}
    if RedisURL.parse(redis_url).path:
        return options
    return {**options, "socket_connect_timeout": min(5.0, max(1.0, retry_s)), "socket_keepalive": True}


def connect_async(redis_url: str, retry_s: float) -> redis.asyncio.Redis:
    """A Redis client for one event loop, not yet connected. It tries nothing again: see `is_lost`.

    `retry_s` bounds how long it waits for an answer, as in `connect`.
    """
    once = redis.asyncio.retry.Retry(NoBackoff(), 0)
    return redis.asyncio.Redis.from_pool(async_pool(redis_url, **_socket(redis_url, retry_s), retry=once))


def is_lost(error: Exception) -> bool:
    """Whether the error says that the connection was lost or not made, so that a later try may succeed."""
    lost = isinstance(error, redis.ConnectionError | redis.TimeoutError)
    return lost and not isinstance(error, redis.AuthenticationError)


def check(redis_url: str) -> None:
    """Ask Redis whether it is there, and one server. Raises redis-py's errors, without waiting for it."""
    client = connect(redis_url, retry_s=1)
    with client, within(1):
        client.ping()
        with suppress(redis.exceptions.NoPermissionError):
            if client.info("cluster").get("cluster_enabled"):
                raise redis.exceptions.ClusterError("cluster_enabled:1")


def may_come(error: QueueError) -> bool:
    """Whether the Redis of an error of `queue_errors` may answer later, without anybody's doing."""
    return error.__cause__ is not None and over(error.__cause__) in (None, "seconds")


@contextmanager
def queue_errors(redis_url: str) -> Iterator[None]:
    """Turn an error of redis-py or kombu into one `QueueError` with the cause and the remedy."""
    try:
        try:
            yield
        except OperationalError as error:  # kombu's wrapping of the errors below
            raise error.__cause__ or redis.ConnectionError(str(error)) from None
    except (redis.RedisError, ConnectionError) as error:
        raise QueueError(sentence(hidden(redis_url), error)) from error
