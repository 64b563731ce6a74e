"""How much a worker does at present: pictures a second, and rows of a step, over the last minute."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: Seconds that are looked back on, in parts of so many.
WINDOW_S, PART_S = 60.0, 5.0
#: Seconds of work after which there is a rate: a worker that has just begun would seem very fast.
_LEAST_S: Final = 2.0


@dataclass
class _Part:
    """What was done within one part of the window."""

    began_s: float
    pictures: int = 0
    steps: int = 0
    rows: int = 0


class Rates:
    """Counts steps and pictures. Thread-safe. `clock` returns monotonic seconds.

    Each step is handed on to `on_step`, with its rows and its seconds.
    """

    def __init__(
        self,
        on_step: Callable[[int, float], None] = lambda rows, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_step = on_step
        self._clock = clock
        self._parts: deque[_Part] = deque()
        self._lock = threading.Lock()

    def step(self, rows: int, seconds: float) -> None:
        """Count one step of so many rows, which took so many seconds."""
        self._on_step(rows, seconds)
        with self._lock:
            part = self._part()
            part.steps += 1
            part.rows += rows

    def picture(self) -> None:
        """Count one picture that was drawn and stored."""
        with self._lock:
            self._part().pictures += 1

    def lately(self) -> tuple[float, float]:
        """Pictures a second, and mean rows of a step, over the last minute; 0 where nothing was done."""
        with self._lock:
            now_s = self._clock()
            self._drop_old(now_s)
            if not self._parts:
                return 0.0, 0.0
            seconds = max(_LEAST_S, now_s - self._parts[0].began_s)
            steps = sum(part.steps for part in self._parts)
            rows = sum(part.rows for part in self._parts)
            pictures = sum(part.pictures for part in self._parts)
            return round(pictures / seconds, 3), round(rows / steps, 2) if steps else 0.0

    def _part(self) -> _Part:
        """The part of now. With the lock held."""
        now_s = self._clock()
        if not self._parts or now_s - self._parts[-1].began_s >= PART_S:
            self._parts.append(_Part(now_s))
            self._drop_old(now_s)
        return self._parts[-1]

    def _drop_old(self, now_s: float) -> None:
        while self._parts and now_s - self._parts[0].began_s > WINDOW_S:
            self._parts.popleft()
