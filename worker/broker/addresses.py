"""The transport where Redis is not at a host and a port: behind a Unix socket, or where sentinels point."""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from worker.broker.channel import Channel, TLSTransport, Transport
from worker.contract.redis_pool import Sentinels, ToPrimary, ToPrimaryTLS, sentinel_arguments
from worker.contract.redis_url import read_hosts


class _PlaceChannel(Channel):
    """The virtual host of its URL is a place and the database: see `RedisURL.broker_url`."""

    @property
    def place(self) -> str:
        """What stands before the database."""
        place: str = self.connection.client.virtual_host.rpartition("/")[0]
        return place

    def _prepare_virtual_host(self, vhost: str) -> int:
        return int(vhost.rpartition("/")[2])


class UnixChannel(_PlaceChannel):
    """The place is the path of the socket."""

    connection_class: Any = redis.UnixDomainSocketConnection

    def _connparams(self, asynchronous: bool = False) -> Any:
        params = super()._connparams(asynchronous=asynchronous)
        for name in (
            "host",
            "port",
            "socket_connect_timeout",
            "socket_keepalive",
            "socket_keepalive_options",
        ):
            params.pop(name, None)
        params["path"] = f"/{self.place}"
        return params


class SentinelChannel(_PlaceChannel):
    """The place is the sentinels, and their name for the primary and its replicas."""

    connection_class: Any = ToPrimary
    connection_class_ssl: Any = ToPrimaryTLS

    def _new_pool(self, params: dict[str, Any]) -> Any:
        arguments = {name: value for name, value in params.items() if name not in ("host", "port")}
        is_tls = bool(self.connection.client.ssl)
        kwargs = {**sentinel_arguments(arguments), "ssl": is_tls, "retry": Retry(NoBackoff(), 0)}
        shared = {name: value for name, value in arguments.items() if name != "connection_class"}
        hosts, _, service = self.place.partition("/")
        sentinels = Sentinels(read_hosts(hosts), sentinel_kwargs=kwargs, **shared)
        return SentinelConnectionPool(service, sentinels, **arguments)


class UnixTransport(Transport):
    """Over a Unix socket."""

    Channel = UnixChannel


class SentinelTransport(Transport):
    """To the primary that the sentinels name at each new connection."""

    Channel = SentinelChannel
    default_port: Any = 26379


class SentinelTLSTransport(SentinelTransport, TLSTransport):
    """The same over TLS, to the sentinels as well."""
