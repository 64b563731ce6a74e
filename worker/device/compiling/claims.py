"""Which machine compiles what the fleet lacks: so that one does, and the others wait for it.

A claim is a small file beside that of the code. Its owner writes another text into it every `RENEW_S`
seconds. One whose text stays the same for `GONE_S` seconds is of a machine that is gone, so no clocks of two
machines are compared. Of two machines that claim at once, the later one stands: each looks again after
`SETTLE_S`. A store that lets both believe it costs time alone, because then both compile.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

#: Seconds between two texts of a claim, without another one until its owner counts as gone, between two looks
#: at another's claim, and until a claim that was made counts.
RENEW_S: Final = 15.0
GONE_S: Final = 60.0
LOOK_S: Final = 10.0
SETTLE_S: Final = 3.0
#: Seconds that a machine waits for others, at most.
MOST_WAIT_S: Final = 1_800.0
#: What ends the name of a claim, and the text of one whose owner is done.
SUFFIX: Final = ".claim"
_DONE: Final = b"done"


class Store(Protocol):
    """Where compiled code is kept, and claims beside it: a folder, or a prefix of a bucket."""

    def get(self, name: str) -> bytes | None:
        """The file; None: there is none. Raises `OSError` or `SmallcatError`."""

    def put(self, name: str, content: bytes) -> None:
        """Keep a file, in the place of another one of this name. Raises alike."""


def is_ending() -> bool:
    """Whether this process is about to end: nothing that can wait should be begun."""
    return not threading.main_thread().is_alive()


class Claims:
    """The claims of one machine. For one thread. Raises what its store raises."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock` returns monotonic seconds."""
        self._store, self._clock, self._sleep = store, clock, sleep
        self._token = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._renewed_s = 0.0

    def take(self, name: str, is_there: Callable[[], bool]) -> bool:
        """Wait until the code is there, or this machine is to compile it. Returns whether it is to.

        `is_there`: looks for the code. It is to compile as well after `MOST_WAIT_S`.
        """
        name += SUFFIX
        until_s = self._clock() + MOST_WAIT_S
        seen, seen_s = self._store.get(name), self._clock()
        while self._clock() < until_s and not is_ending():
            if seen in (None, _DONE) or self._clock() - seen_s > GONE_S:
                self._write(name)
                self._pause(SETTLE_S)
            else:
                self._pause(LOOK_S)
            # Its owner puts the code first, and is done then.
            text = self._store.get(name)
            is_mine = text is not None and text.startswith(self._token.encode())
            if is_there():
                if is_mine:
                    self._store.put(name, _DONE)
                return False
            if is_mine:
                return True
            if text != seen:
                seen, seen_s = text, self._clock()
        return True

    def renew(self, name: str) -> None:
        """Say that this machine still compiles, if that is due. Call it every few seconds."""
        if self._clock() - self._renewed_s > RENEW_S:
            self._write(name + SUFFIX)

    def end(self, name: str) -> None:
        """Say that this machine compiles it no longer."""
        self._store.put(name + SUFFIX, _DONE)

    def _write(self, name: str) -> None:
        self._renewed_s = self._clock()
        self._store.put(name, f"{self._token} {next(self._numbers)}".encode())

    def _pause(self, seconds: float) -> None:
        """Sleep, but no longer than this process lives."""
        until_s = self._clock() + seconds
        while (left_s := until_s - self._clock()) > 0 and not is_ending():
            self._sleep(min(left_s, 0.5))
