"""Scripts that many threads run: those that wait at the same time go to Redis in one round trip.

A worker's jobs end in bunches, and then each of its threads has a script to run. A round trip costs Redis as
much as a script.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from redis.client import Redis


class _Call:
    """A call that waits."""

    def __init__(self, digest: str, keys: Sequence[str], args: Sequence[Any]) -> None:
        self.command = (digest, len(keys), *keys, *args)
        #: Set once it is answered, or it is the turn of its thread to send what waits.
        self.turn = threading.Event()
        #: Redis' answer, in a list; empty: there is none, and its thread has to call by itself.
        self.answer: list[Any] = []
        self.was_sent = False


class Together:
    """Runs scripts on one Redis, for many threads. Only such as may be sent twice.

    While a call is on its way others wait. Then one of their threads sends all that wait, in the order in
    which they came. Each is whole or not at all, as if it were alone.
    """

    #: Calls in one round trip, at most: all other clients of Redis wait for them.
    MOST: Final = 32

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._is_sending = False

    def __call__(
        self, digest: str, keys: Sequence[str], args: Sequence[Any], alone: Callable[[], Any]
    ) -> Any:
        """Run the script of that digest. `alone` runs it by itself: where nothing else waits, and where Redis
        refused it, or its connection was lost for good. What `alone` raises is raised."""
        call = _Call(digest, keys, args)
        with self._lock:
            self._waiting.append(call)
            sends, self._is_sending = not self._is_sending, True
        if not sends:
            call.turn.wait()
        if not call.was_sent:
            calls = self._taken()
            try:
                if len(calls) == 1:
                    return alone()
                self._send(calls)
            finally:
                self._hand_over(calls)
        return call.answer[0] if call.answer else alone()

    def _taken(self) -> list[_Call]:
        """The calls that are sent now. The first of them is that of this thread."""
        with self._lock:
            calls, self._waiting = self._waiting[: self.MOST], self._waiting[self.MOST :]
        for call in calls:
            call.was_sent = True
        return calls

    def _send(self, calls: Sequence[_Call]) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            for call in calls:
                pipe.evalsha(*call.command)
            try:
                answers = pipe.execute(raise_on_error=False)
            except Exception:  # noqa: BLE001 -- each meets it again, alone
                return
        for call, answer in zip(calls, answers, strict=True):
            if not isinstance(answer, Exception):
                call.answer.append(answer)

    def _hand_over(self, calls: Sequence[_Call]) -> None:
        """Let the threads of these calls go on, and the first of those that wait send."""
        with self._lock:
            self._is_sending = bool(self._waiting)
            following = self._waiting[:1]
        for call in (*following, *calls):
            call.turn.set()
