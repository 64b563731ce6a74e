"""The items of a plan, a window of jobs at a time, as far as the run's gate lets them through."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Final

from producer.ingest.plan import Planned, Rejected
from producer.ingest.types import Gate

#: Seconds until a gate that did not let all through is asked again.
HELD_S: Final = 1.0


class Windows:
    """The windows of one run. `notice` is told once why jobs have to wait."""

    def __init__(self, gate: Gate, notice: Callable[[str], None]) -> None:
        self._gate, self._notice = gate, notice
        self._items: Iterator[Planned | Rejected] = iter(())
        self._held_until_s = 0.0
        self._is_told = False

    def begin(self, items: Iterator[Planned | Rejected]) -> None:
        """Go on with these items."""
        self._items = items

    def next(self, first: int, size: int, room: int) -> tuple[list[Planned | Rejected], bool]:
        """The next items, up to `size` and with up to `room` jobs; and whether there are no more.

        `first` is the number of the first job in the run. None while the gate lets nothing through.
        """
        if time.monotonic() < self._held_until_s:
            return [], False
        window: list[Planned | Rejected] = []
        places: list[int] = []
        is_last = False
        while len(window) < size and len(places) < room and not is_last:
            each = next(self._items, None)
            is_last = each is None
            if isinstance(each, Planned):
                places.append(len(window))
            if each is not None:
                window.append(each)
        jobs = [each.templated for each in window if isinstance(each, Planned)]
        admitted, why = self._gate.admit(first, jobs)
        if admitted == len(jobs):
            return window, is_last
        self._held_until_s = time.monotonic() + HELD_S
        if not self._is_told:
            self._is_told = True
            self._notice(f"The rest waits: {why}")
        cut = places[admitted]
        self._items = itertools.chain(window[cut:], self._items)
        return window[:cut], False
