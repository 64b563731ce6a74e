"""Requests to receivers, which may be anybody's: nothing of theirs is believed, and none of ours is reached.

The name of a host is looked up here, and the connection is made to the very address that was checked. The
certificate, SNI and Host are the name's. Redirects are not followed, and no proxy of the environment is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpcore2 as httpcore

from worker.contract.webhook import Hosts

#: Bytes of an answer that are read, and seconds; one that goes on is cut off. Its status is what counts.
_READ, _READ_S = 16_384, 2.0
#: Threads that look up names: a look-up may take longer than its request.
_LOOK_UPS: Final = 256
#: Seconds that a connection is kept for the next notification, and those that are kept.
_KEPT_S, _KEPT = 10.0, 64


class UnsentError(Exception):
    """Raised when a notification could not be delivered. Its text says why, for the operator."""


class LateError(UnsentError):
    """Raised when a receiver did not answer in time."""


class RefusedAddressError(UnsentError):
    """Raised when a webhook leads where it must not."""


class Connections:
    """Sends requests. For one event loop."""

    def __init__(self, hosts: Hosts, timeout_s: float, most: int) -> None:
        """`timeout_s`: seconds for all of a request. `most`: connections at once."""
        self._hosts, self._timeout_s = hosts, timeout_s
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=most,
            max_keepalive_connections=_KEPT,
            keepalive_expiry=_KEPT_S,
            network_backend=_Checked(hosts),
        )

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str]:
        """Send `body`; the answer's status and its Retry-After. Raises `UnsentError`."""
        try:
            self._hosts.check(url)
        except ValueError as error:
            raise RefusedAddressError(f"its webhook {error}") from None
        given = {
            "user-agent": "smallcat-webhooks",
            "accept": "*/*",
            "content-length": str(len(body)),
            **headers,
        }
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._pool.stream("POST", url, headers=list(given.items()), content=body) as answer,
            ):
                retry_after = dict(answer.headers).get(b"retry-after", b"").decode("latin-1")
                await _read(answer)
                return answer.status, retry_after
        except TimeoutError:
            raise LateError(f"it did not answer within {self._timeout_s:g} s") from None
        except RefusedAddressError:
            raise
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
            raise UnsentError(_words(error)) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


async def _read(answer: httpcore.Response) -> None:
    """Read a short body, so that the connection can carry the next request."""
    size = 0
    with contextlib.suppress(TimeoutError, httpcore.NetworkError, httpcore.ProtocolError):
        async with asyncio.timeout(_READ_S):
            async for piece in answer.aiter_stream():
                if (size := size + len(piece)) > _READ:
                    return


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to permitted addresses alone."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._backend = httpcore.AnyIOBackend()
        # Not the threads that everybody shares: a slow look-up holds up nothing else.
        self._threads = ThreadPoolExecutor(_LOOK_UPS, "webhook look-up")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to one of the host's addresses."""
        name = host.strip("[]").lower().rstrip(".")
        permitted = [
            each for each in await self._addresses(name, port) if self._hosts.permits(name, port, each)
        ]
        if not permitted:
            raise RefusedAddressError(
                f"{name} stands for no public address now: list it in SMALLCAT_WEBHOOK_HOSTS to permit it"
            )
        for last, address in enumerate(permitted, 1):
            try:
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if last == len(permitted):
                    raise
        raise AssertionError

    async def sleep(self, seconds: float) -> None:
        """As its parent's."""
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int) -> list[str]:
        """What a name stands for now, as the system resolves it."""
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        except (OSError, UnicodeError):
            raise UnsentError(f"the name {host} cannot be looked up") from None
        return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _words(error: Exception) -> str:
    text = str(error).partition("\n")[0][:200]
    return f"{type(error).__name__}{f': {text}' if text else ''}"
