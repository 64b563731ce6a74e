"""What a step costs by its rows, measured, and what follows from it: the cap of a batch. No torch.

A step of more rows costs more, but less for each, until the device is full: then a larger batch only makes
its jobs wait for each other. Where that is depends on device, model and size, so it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: How much less a row must cost in a batch twice as large for that batch to be worth it.
WORTH_IT = 0.03
#: Rows that are tried, as far as they fit and pay.
ROWS = (1, 2, 4, 8, 16, 32, 64)
#: The cap of a device for which more does not pay: a guided job's two rows.
LEAST = 2

#: (rows, seconds a step), by rows.
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class StepCost:
    """The cost of steps over latents of any size, from a curve measured at one of them.

    A device is full at about the same number of latent pixels, and runs out of memory likewise, so a row of
    twice the area counts as two.
    """

    #: Measured; empty: nothing was, and each row costs the same.
    curve: Curve
    #: Latent pixels of a row when it was measured.
    area: int
    #: Rows worth having in a step of that size, >= 1.
    max_rows: int

    def cap(self, area: int) -> int:
        """Rows worth having in a step over latents of `area` pixels: as much work, at least one row."""
        return max(1, min(ROWS[-1], self.max_rows * self.area // area))

    def seconds(self, rows: int, area: int) -> float:
        """What a step of `rows` rows of `area` pixels costs: between the measured points, in a straight line.

        In seconds where a curve was measured, else in units of its own.
        """
        work = rows * area / self.area
        if not self.curve:
            return work
        before_rows, before_s = 0, self.curve[0][1]
        for at, seconds in self.curve:
            if work <= at:
                return before_s + (seconds - before_s) * (work - before_rows) / (at - before_rows)
            before_rows, before_s = at, seconds
        return before_s * work / before_rows


def pays(curve: Curve) -> bool:
    """Whether the last point of `curve` is worth it against the one before."""
    if len(curve) < 2:
        return True
    (few, few_s), (many, many_s) = curve[-2:]
    return many_s / many <= (1 - WORTH_IT) * few_s / few


def choose(curve: Curve) -> tuple[int, str]:
    """The most rows worth having in a step, at least `LEAST`, and why, with the curve."""
    cap = LEAST
    for points in range(2, len(curve) + 1):
        if pays(curve[:points]):
            cap = max(cap, curve[points - 1][0])
    told = ", ".join(f"{rows}: {1e3 * seconds / rows:.3g}" for rows, seconds in curve)
    return cap, f"more gain less than {WORTH_IT:.0%} a row; measured ms a row by rows: {told}"


def is_over(curve: Curve) -> bool:
    """Whether there is no point in trying more rows. One point that does not pay may be noise."""
    return not pays(curve) and not pays(curve[:-1])


#: Jobs on board for each row of a batch: while one is rendered, the next is prepared or the last decoded.
JOBS_PER_ROW = 2
#: Seconds in which a picture is encoded and uploaded, with some to spare: as many more jobs are on board as
#: end in that time, up to a batch. Measured by `tests.benchmarks.emulated`.
UPLOAD_S = 0.25
#: Rows of a batch for each place more that only urgent jobs may take: a batch of guided ones finds places.
ROWS_PER_URGENT = 2


def places(max_rows: int, job_s: float) -> tuple[int, int]:
    """How many jobs a worker has on board, and how many more of them that are urgent.

    `max_rows`: rows of a step. `job_s`: seconds of the device's time for a job, in full batches.
    """
    uploaded = min(max_rows, math.ceil(UPLOAD_S / job_s))
    return JOBS_PER_ROW * max_rows + uploaded, max(1, max_rows // ROWS_PER_URGENT)
