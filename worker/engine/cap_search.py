"""The most rows that a step should have, found by steps of jobs. No torch.

A worker that serves before its steps are compiled has measured uncompiled ones, which gain by other batch
sizes. Measuring compiled ones apart would hold jobs up. So while there is more work than a batch holds, each
size is the cap for a few steps, from the smallest on, until larger ones gain nothing more.
"""

from __future__ import annotations

import statistics
from typing import Final

from worker.engine.step_cost import BATCH_SIZES, Curve, is_past_gain

#: Steps of a size that do not count, because its kernels are loaded and its graph captured; and that do.
COLD: Final = 3
COUNTED: Final = 3
#: Steps after which a size is given up for which there are too few jobs, and how often that may be.
MOST_STEPS: Final = 24
MOST_TRIES: Final = 5


class CapSearch:
    """Tries batch sizes. For one thread."""

    def __init__(self, most: int | None = None) -> None:
        """`most`: rows that fit in memory; None: as many as gain."""
        #: (rows, seconds a step) so far.
        self.curve: list[tuple[int, float]] = []
        self._sizes = iter([size for size in BATCH_SIZES[1:] if most is None or size <= most])
        self._size: int | None = next(self._sizes, None)
        #: Whether the size is being tried.
        self._is_trying = False
        self._steps, self._failed = 0, 0
        self._seconds: list[float] = []

    @property
    def gave_up(self) -> bool:
        """Whether there were too few jobs for some size."""
        return self._failed == MOST_TRIES

    @property
    def cap(self) -> int | None:
        """The cap that is being tried; None: none is."""
        return self._size if self._is_trying else None

    def note(self, rows: int, seconds: float, *, is_full: bool) -> Curve | None:
        """A step of so many rows took so long. Returns the whole curve once nothing is left to try.

        `is_full`: it had as many rows as the usual cap lets it, so that more jobs may wait.
        """
        if self._size is None:
            return None
        if not self._is_trying:
            self._is_trying = is_full
            return None
        self._steps += 1
        if rows == self._size:
            self._seconds.append(seconds)
        if len(self._seconds) == COLD + COUNTED:
            self.curve.append((self._size, statistics.median(self._seconds[COLD:])))
            self._size = None if is_past_gain(self.curve) else next(self._sizes, None)
        elif self._steps < MOST_STEPS:
            return None
        else:
            self._failed += 1
            self._is_trying = False
            if self._failed == MOST_TRIES:
                self._size = None
        self._steps, self._seconds = 0, []
        return self.curve if self._size is None else None
