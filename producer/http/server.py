"""The server process: uvicorn with limits on the heads of requests, that drains on SIGTERM."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import signal
import socket
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from producer.http import run_folder
from producer.http.app import make_app
from producer.http.guard import Guard
from producer.http.tracing import Traced
from worker.contract.errors import CallerError
from worker.contract.plain_log import set_up_log
from worker.contract.settings import ServerSettings
from worker.health.report import Health
from worker.tracing.submissions import service_is

logger = logging.getLogger("smallcat.http")

#: Seconds in which the head of a request must arrive, and bytes that it may have.
HEAD_S, MAX_HEAD = 15.0, 64 * 1024
#: Seconds that a connection stays open between two requests.
KEEP_ALIVE_S: Final = 30
#: Seconds that requests have to end after SIGTERM.
DRAIN_S: Final = 30
#: Seconds after which a loop that has not run counts as stuck.
STUCK_S: Final = 30.0


class _Protocol(HttpToolsProtocol):
    """uvicorn's own, which waits for the rest of a head without end."""

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head and self._timer is None:
            self._arm()
        self._size += len(data)
        super().data_received(data)
        if self._in_head and self._size > MAX_HEAD and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._disarm()
        self._in_head = False
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self._in_head, self._size = True, 0
        super().on_response_complete()

    def _arm(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._end)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's own, which tells the app before it waits for its requests to end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, health: Health) -> None:
        super().__init__(config)
        self._app, self._health = app, health
        #: When the loop last ran, monotonic seconds.
        self._ran_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if (backend := getattr(self._app.state, "backend", None)) is not None:
            backend.draining.set()
        self._health.stopping()
        # Not uvicorn's own, which ends by the signal: a server that has drained has ended well.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            logger.info("The HTTP API listens on %s.", url_of(self.config.host, self.config.port))
            self._ran_s = time.monotonic()
            self._health.started(
                # The loop does not tick while the last requests end.
                stuck_s=lambda: math.inf if self.should_exit else self._ran_s + STUCK_S,
                stuck_as=f"The server's loop has not run for {STUCK_S:.0f} s.",
                not_ready=self._why_not_ready,
            )

    async def on_tick(self, counter: int) -> bool:
        """As uvicorn's, which calls it ten times a second."""
        self._ran_s = time.monotonic()
        return await super().on_tick(counter)

    def _why_not_ready(self) -> str:
        """Why Redis does not let the server work; empty where it does. Blocks while it is away."""
        session = self._app.state.backend.session
        with session.queue_errors():
            session.redis.ping()
        return ""


def serve(
    settings: ServerSettings,
    *,
    is_open: bool,
    access_log: bool = False,
    beside: AbstractContextManager[None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was begun; `beside` runs as long.

    Raises `CallerError`, `SettingsError`, `OSError`.
    """
    if is_open and not _is_loopback(settings.http_host):
        raise CallerError(
            f"--no-auth on {settings.http_host} would let everybody in: listen on 127.0.0.1, or make a key "
            "with `smallcat keys add NAME`."
        )
    set_up_log(settings.log)
    service_is("smallcat-api")
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    health = Health(settings.health_port)
    health.start()
    app = make_app(settings, is_open=is_open, beside=beside)
    guard = Guard(
        app,
        max_body=settings.http_max_body_mb * 1_000_000,
        max_upload=settings.http_max_upload_mb * 1_000_000,
        is_open=is_open,
        logs_values=settings.http_log_prompts,
    )
    options: dict[str, Any] = {
        "proxy_headers": bool(settings.http_trusted_proxies),
        "forwarded_allow_ips": settings.http_trusted_proxies or None,
    }
    config = uvicorn.Config(
        Traced(guard),
        host=settings.http_host,
        port=settings.http_port,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=access_log,
        server_header=False,
        limit_concurrency=settings.http_max_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
        **options,
    )
    # Here, where an error is a sentence.
    run_folder.claim(run_folder.chosen(settings))
    try:
        _Server(config, app, health).run()
    except SystemExit:
        where = f"{settings.http_host}, port {settings.http_port}"
        raise CallerError(
            f"The server cannot listen on {where}; its log says why: name another --host or --port."
        ) from None


def url_of(host: str, port: int) -> str:
    """The address of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
