"""When an engine counts as stuck: its jobs in flight have not moved for much longer than a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable

#: Seconds without movement, and times the measured time of a step, after which jobs in flight are stuck: the
#: longer of the two.
PATIENCE_S, STEP_TIMES = 30.0, 20.0


class Movement:
    """The last movement of the jobs in flight. A step, a picture and an ended job are movements.

    `clock` returns monotonic seconds. While `is_compiling` returns True, that counts as movement: compiling
    takes minutes, and so does a step that waits for it. Each method only sets attributes: it may be called
    from any thread.
    """

    def __init__(self, clock: Callable[[], float], is_compiling: Callable[[], bool]) -> None:
        self._clock = clock
        #: Whether something compiles.
        self.is_compiling = is_compiling
        self._moved_s = clock()
        self._patience_s = PATIENCE_S
        self._has_jobs = False

    def expect(self, step_s: float) -> None:
        """A step begins that should take so many seconds."""
        self._patience_s = max(PATIENCE_S, STEP_TIMES * step_s)
        self._moved_s = self._clock()

    def joined(self, *, is_first: bool) -> None:
        """A job has joined. One that is not the first is no movement of the others."""
        if is_first:
            self.moved()

    def moved(self, *, has_jobs: bool = True) -> None:
        """Something has moved. `has_jobs`: whether jobs are in flight now."""
        self._moved_s = self._clock()
        self._has_jobs = has_jobs

    @property
    def stuck_s(self) -> float:
        """By `clock`: when the engine counts as stuck, unless something moves; infinity without jobs."""
        if self.is_compiling():
            self._moved_s = self._clock()
        return self._moved_s + self._patience_s if self._has_jobs else math.inf
