"""Around the app: no request takes more than its share, and no error shows what was in it.

A body is counted while it arrives, and must arrive in time; whoever does not read the answer is cut off.
Heads of requests are `server`'s, which sees them.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from typing import Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producer.http.problems import RefusedError, answer
from worker.contract.explain import in_json

logger = logging.getLogger("smallcat.http")

#: Seconds in which a body must begin to arrive or go on, and in all, and bytes a second of a larger one.
PIECE_S, WHOLE_S, BYTES_S = 20.0, 60.0, 64 * 1024
#: Seconds that a client may take to read a piece of its answer.
READ_S: Final = 60.0
#: Paths of uploads, which may be larger than other bodies.
UPLOADS: Final = frozenset(("/v1/runs",))
#: Path of pictures, each of which is a body.
INPUTS: Final = "/v1/inputs"
#: Names of this machine.
_LOOPBACK: Final = frozenset(("localhost", "127.0.0.1", "::1"))


class Guard:
    """The app with limits. `is_open`: no key is asked for, so nobody but this machine may be meant."""

    def __init__(
        self, app: ASGIApp, *, max_body: int, max_upload: int, is_open: bool, logs_values: bool
    ) -> None:
        self._app = app
        self._max_body, self._max_upload = max_body, max_upload
        self._is_open, self._logs_values = is_open, logs_values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_upload if scope["path"] in UPLOADS else self._max_body
        body, reply = _Body(receive, limit, scope["path"]), _Answer(send)
        notation = in_json.set(True)
        try:
            if (refused := self._refused(scope, limit)) is not None:
                await answer(refused)(scope, receive, send)
                return
            await self._app(scope, body, reply)
        except TimeoutError:
            # uvicorn closes the connection of an answer that is not whole.
            logger.warning("A client did not read its answer within %g s and was cut off.", READ_S)
        except Exception as error:  # noqa: BLE001 - what the app did not expect
            self._log(error)
            if not reply.has_begun:
                await answer(error)(scope, receive, send)
        finally:
            in_json.reset(notation)

    def _refused(self, scope: Scope, limit: int) -> RefusedError | None:
        """Why a request is refused by its head alone."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            return too_large(limit, scope["path"])
        if self._is_open:
            host = _host(f"//{headers.get(b'host', b'').decode('latin-1')}")
            origin = headers.get(b"origin", b"").decode("latin-1")
            if host not in _LOOPBACK or (origin and _host(origin) not in _LOOPBACK):
                return RefusedError(
                    403,
                    "This server asks for no key, and so answers this machine alone: use http://localhost.",
                )
        return None

    def _log(self, error: Exception) -> None:
        """Log where a fault is, and what it says only where prompts may be logged."""
        if self._logs_values:
            logger.error("The server has a fault.", exc_info=error)
            return
        frames = "".join(traceback.format_tb(error.__traceback__))
        logger.error("The server has a fault, %s:\n%s", type(error).__name__, frames)


def too_large(limit: int, path: str) -> RefusedError:
    """The refusal of a body of more than `limit` bytes for a path."""
    if path in UPLOADS:
        remedy = "compress the prompt file, split it, or raise SMALLCAT_HTTP_MAX_UPLOAD_MB at the server"
    elif path == INPUTS:
        remedy = "make the picture smaller, or raise SMALLCAT_HTTP_MAX_BODY_MB at the server"
    else:
        remedy = f"send less at once, pictures to {INPUTS}, or a prompt file to /v1/runs"
    return RefusedError(
        413,
        f"The body has more than {limit // 1_000_000:,} MB: {remedy}.",
        headers={"Connection": "close"},
    )


class _Body:
    """Receives a request's body, counted and in time."""

    def __init__(self, receive: Receive, limit: int, path: str) -> None:
        self._receive, self._limit, self._path = receive, limit, path
        self._size, self._is_whole = 0, False
        self._began_s = asyncio.get_running_loop().time()

    async def __call__(self) -> Message:
        """The next message. Raises `RefusedError` (408, 413)."""
        if self._is_whole:
            return await self._receive()
        spent_s = asyncio.get_running_loop().time() - self._began_s
        left_s = WHOLE_S + self._size / BYTES_S - spent_s
        try:
            async with asyncio.timeout(max(0.0, min(PIECE_S, left_s))):
                message = await self._receive()
        except TimeoutError:
            raise RefusedError(
                408, "The body did not arrive in time: send it again.", headers={"Connection": "close"}
            ) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._limit:
                raise too_large(self._limit, self._path)
            self._is_whole = not message.get("more_body", False)
        return message


class _Answer:
    """Sends a request's answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        """Send a message. Raises `TimeoutError` where the client does not read."""
        self.has_begun = True
        async with asyncio.timeout(READ_S):
            await self._send(message)


def _host(address: str) -> str:
    """The host of an address, without its port; empty where it has none, or is no address."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
