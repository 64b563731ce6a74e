"""What one connection knows of the lists that it fetches from, and where it waits while they are empty."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from worker.broker.layout import Layout
from worker.contract.job import FORMAT_VERSION

#: Beginnings of the keys of rooms, and of the channels of those who wait in them.
ROOM: Final = "smallcat:worker-only:wait:"
CALL: Final = "smallcat:worker-only:call:"

#: Milliseconds that a watcher's place lasts without a fetch: two of them may come late.
PLACE_MS: Final = 5_000

#: Place of one who stood in line and was called.
CALLED: Final = "called"


@dataclass
class Room:
    """The connection among those that fetch from the same lists; see `waiting_room.lua`."""

    #: Its key in Redis.
    key: str
    #: As `waiting_room.lua` has it; empty: it does not wait here.
    place: str = ""
    #: Until when the lists are known to be empty, monotonic seconds, unless a notice comes before.
    empty_until_s: float = 0.0

    @property
    def watches(self) -> bool:
        """Whether it hears of every message that is pushed."""
        return self.place in ("1", "2")


class Waiting:
    """The rooms of one connection: there is one for each choice of priorities that it may fetch."""

    def __init__(self, layout: Layout) -> None:
        self._prefix = layout.prefix
        #: The channel on which it is called.
        self.who = f"{layout.prefix}{CALL}{uuid.uuid4().hex}"
        #: Whether Redis has confirmed that it passes on calls.
        self.can_be_called = False
        self._rooms: dict[tuple[int, ...], Room] = {}

    def room(self, queues: Iterable[str], steps: Sequence[int]) -> Room:
        """The room of those who fetch from the same lists: these priorities of these queues."""
        found = self._rooms.get(tuple(steps))
        if found is None:
            # Workers of other versions look for parked messages in other lists.
            name = repr((sorted(queues), list(steps), FORMAT_VERSION)).encode()
            key = f"{self._prefix}{ROOM}{hashlib.sha256(name).hexdigest()[:16]}"
            found = self._rooms[tuple(steps)] = Room(key)
        return found

    def leave(self) -> list[Room]:
        """Forget all rooms, since the queues change; returns those where it has a place."""
        left = [room for room in self._rooms.values() if room.place]
        self._rooms.clear()
        return left

    def hear(self, notice: Sequence[Any]) -> None:
        """Take a notice of Redis: a list has changed, or this connection is called, or can be from now on."""
        kind, *_, said = [each.decode() if isinstance(each, bytes) else each for each in notice]
        if kind == "subscribe":
            self.can_be_called = True
        if kind not in ("invalidate", "message"):
            return
        for room in self._rooms.values():
            room.empty_until_s = 0.0
            if kind == "message" and said == room.key:
                room.place = CALLED
