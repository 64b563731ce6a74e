"""The open streams of events of one server: how many one key, or one tenant, may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from starlette.responses import StreamingResponse

from producer.http.problems import RefusedError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from producer.http.caller import Caller

#: The part of a server's connections that the streams of one key or one tenant may have.
PART: Final = 4
#: Seconds after which a client that has too many streams may try again.
_RETRY_S: Final = 5
#: Of every stream.
HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Streams:
    """Counts the open streams. From within one event loop."""

    def __init__(self, max_connections: int) -> None:
        self._most = max(1, max_connections // PART)
        self._open: Counter[str] = Counter()

    def open(self, caller: Caller, events: AsyncIterator[str]) -> Stream:
        """The answer that sends `events`. Raises `RefusedError` (429) where the caller has too many."""
        whose = caller.tenant_mark or caller.mark
        if self._open[whose] >= self._most:
            name = f"The tenant {caller.tenant}" if caller.tenant else f'The key "{caller.name}"'
            raise RefusedError(
                429,
                f"{name} has {self._open[whose]:,} open streams of events: its limit is {self._most:,}, "
                f"1/{PART} of SMALLCAT_HTTP_MAX_CONNECTIONS. Close some, or ask for the jobs now and then.",
                code="LimitReached",
                headers={"Retry-After": str(_RETRY_S)},
            )
        self._open[whose] += 1
        return Stream(self, whose, events)

    def closed(self, whose: str) -> None:
        """One of them has ended."""
        self._open[whose] -= 1
        if not self._open[whose]:
            del self._open[whose]


class Stream(StreamingResponse):
    """Server-sent events, which count until the client has hung up or all were sent."""

    def __init__(self, streams: Streams, whose: str, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._streams, self._whose = streams, whose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.closed(self._whose)
