"""redis-py's connection pools for a `REDIS_URL`: over TCP, TLS, a Unix socket, or to where sentinels point.

Imported when a connection is first needed: redis-py takes a while to load.
"""

# mypy: disallow-untyped-calls=False
# redis-py types neither its sentinels nor its retries.

from __future__ import annotations

import threading
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.contract.redis_url import RedisURL

#: Seconds that one sentinel may take: it answers at once or not at all, and there are others to ask.
SENTINEL_TIMEOUT_S = 1.0


class _AsksAgain:
    """A connection of redis-py to the primary that sentinels name, which asks them each time it connects.

    redis-py's own asks when the pool hands it out. Where it is lost under a command that is sent again, it
    goes back to the address of before: to a primary that is dead, or a replica now, for as long as the
    command is repeated.
    """

    _sock: Any
    connect: Any

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command; connect first where the connection was lost."""
        if not self._sock:
            self.connect()
        super().send_packed_command(command, check_health)  # type: ignore[misc]


class ToPrimary(_AsksAgain, redis.sentinel.SentinelManagedConnection):
    """A connection to the primary."""


class ToPrimaryTLS(_AsksAgain, redis.sentinel.SentinelManagedSSLConnection):
    """The same over TLS."""


class Sentinels(redis.sentinel.Sentinel):
    """redis-py's sentinels, but all are asked. Where they want a password, they get Redis' user and password.

    redis-py believes the first that answers, for as long as it answers. One that missed a failover, cut off
    or on a machine that stood still, would send everybody to a primary that is none any more.
    """

    def discover_master(self, service_name: str) -> Any:
        """(host, port) of the primary. Raises redis-py's `MasterNotFoundError`, a lost connection."""
        answers = []
        for sentinel in list(self.sentinels):
            for _ in range(2):
                try:
                    answers.append(sentinel.sentinel_masters())
                except (redis.ConnectionError, redis.TimeoutError) as error:
                    if _has_password_now(self, sentinel, error):
                        continue
                break
        return _newest(self, service_name, answers)


class _AsyncSentinels(redis.asyncio.sentinel.Sentinel):
    """The same for event loops."""

    async def discover_master(self, service_name: str) -> Any:
        """(host, port) of the primary."""
        answers = []
        for sentinel in list(self.sentinels):
            for _ in range(2):
                try:
                    answers.append(await sentinel.sentinel_masters())
                except (redis.ConnectionError, redis.TimeoutError) as error:
                    if _has_password_now(self, sentinel, error):
                        continue
                break
        return _newest(self, service_name, answers)


def _newest(sentinels: Any, service: str, answers: list[Any]) -> tuple[str, int]:
    """The primary of the latest failover that a sentinel knows of, among those that it sees alive."""
    known = [answer[service] for answer in answers if service in answer]
    alive = [state for state in known if sentinels.check_master_state(state, service)]
    if not alive:
        raise redis.sentinel.MasterNotFoundError(
            f"No master found for {service!r}: {len(answers)} of {len(sentinels.sentinels)} sentinels answer"
        )
    newest = max(alive, key=lambda state: int(state["config-epoch"]))
    return newest["ip"], newest["port"]


def _has_password_now(sentinels: Any, sentinel: Any, error: Exception) -> bool:
    """Whether the sentinel wants a password and did not have ours; it has it now."""
    arguments = sentinel.connection_pool.connection_kwargs
    wanted = {name: sentinels.connection_kwargs.get(name) for name in ("username", "password")}
    is_asked = isinstance(error, redis.AuthenticationError)
    if not is_asked or not wanted["password"] or arguments.get("password"):
        return False
    arguments.update(wanted)
    sentinel.connection_pool.reset()  # What is open was refused, and would be used again.
    return True


def sentinel_arguments(connection: dict[str, Any]) -> dict[str, Any]:
    """What the connections to sentinels share with those to Redis, whose arguments are `connection`."""
    tls = {name: value for name, value in connection.items() if name.startswith("ssl")}
    return {
        "socket_connect_timeout": SENTINEL_TIMEOUT_S,
        "socket_timeout": SENTINEL_TIMEOUT_S,
        "socket_keepalive": True,
        **tls,
    }


class _Bounded(redis.ConnectionPool):
    """A pool with so many connections at most: whoever needs one more waits for it."""

    def __init__(self, *args: Any, connections: int, **kwargs: Any) -> None:
        self._free = threading.Semaphore(connections)
        super().__init__(*args, **kwargs)

    def get_connection(self, *args: Any, **kwargs: Any) -> Any:
        """One that is free, or made. redis-py itself gives one back that cannot be connected."""
        self._free.acquire()
        return super().get_connection(*args, **kwargs)

    def release(self, connection: Any) -> None:
        """Give it back: each once, as redis-py does."""
        super().release(connection)
        self._free.release()


class _BoundedSentinel(_Bounded, redis.sentinel.SentinelConnectionPool):
    """The same for a primary that sentinels name."""


def pool(redis_url: str, connections: int | None = None, **options: Any) -> redis.ConnectionPool:
    """A pool for `redis_url`; nothing is connected yet. `options` are redis-py's.

    connections: how many there are at most, >= 1; None: as many as are needed at once.
    """
    url = RedisURL.parse(redis_url)
    arguments = {**_arguments(url), **options}
    limit = {"connections": connections} if connections else {}
    if url.is_sentinel:
        once = Retry(NoBackoff(), 0)
        kwargs = {**sentinel_arguments(arguments), "ssl": url.is_tls, "retry": once}
        sentinels = Sentinels(url.hosts, sentinel_kwargs=kwargs, **arguments)
        arguments["connection_class"] = ToPrimaryTLS if url.is_tls else ToPrimary
        of_sentinels = _BoundedSentinel if connections else redis.sentinel.SentinelConnectionPool
        return of_sentinels(url.service, sentinels, **limit, **arguments)
    if url.scheme == "unix":
        kind: Any = redis.UnixDomainSocketConnection
    else:
        kind = redis.SSLConnection if url.is_tls else redis.Connection
    if connections:
        return _Bounded(connection_class=kind, connections=connections, **arguments)
    return redis.ConnectionPool(connection_class=kind, **arguments)


def async_pool(redis_url: str, **options: Any) -> redis.asyncio.ConnectionPool:
    """The same for one event loop."""
    url = RedisURL.parse(redis_url)
    arguments = {**_arguments(url), **options}
    if url.is_sentinel:
        once = redis.asyncio.retry.Retry(NoBackoff(), 0)
        kwargs = {**sentinel_arguments(arguments), "ssl": url.is_tls, "retry": once}
        sentinels = _AsyncSentinels(list(url.hosts), sentinel_kwargs=kwargs, **arguments)
        return redis.asyncio.sentinel.SentinelConnectionPool(
            url.service, sentinels, ssl=url.is_tls, **arguments
        )
    if url.scheme == "unix":
        kind: Any = redis.asyncio.UnixDomainSocketConnection
    else:
        kind = redis.asyncio.SSLConnection if url.is_tls else redis.asyncio.Connection
    return redis.asyncio.ConnectionPool(connection_class=kind, **arguments)


def _arguments(url: RedisURL) -> dict[str, Any]:
    """redis-py's arguments for a connection."""
    arguments: dict[str, Any] = {
        "db": url.db,
        "username": url.username,
        "password": url.password,
        **url.tls_options,
    }
    if url.protocol:
        arguments["protocol"] = url.protocol
    if url.scheme == "unix":
        arguments["path"] = url.path
    elif not url.is_sentinel:
        (arguments["host"], arguments["port"]) = url.hosts[0]
    return arguments
