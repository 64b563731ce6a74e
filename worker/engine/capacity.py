"""How many jobs a worker has in flight, so that its device never waits for one."""

from __future__ import annotations

import math

from worker.engine.runner import Sizes
from worker.engine.step_cost import BATCH_SIZES

#: Jobs in flight for each row of a step: while one is denoised, the next is prepared or the last is decoded.
JOBS_PER_ROW = 2
#: Seconds in which a picture is encoded and uploaded, with a margin. So many more jobs are in flight as the
#: device finishes in that time, up to one batch. Measured by `tests.benchmarks.emulated`.
UPLOAD_S = 0.25
#: Rows of a step for each slot that is reserved for urgent jobs: a batch of guided urgent jobs finds slots.
ROWS_PER_RESERVED_SLOT = 2


def uploading_jobs(max_rows: int, job_s: float) -> int:
    """How many of a worker's jobs are being encoded and uploaded at any time, at most `max_rows`."""
    return min(max_rows, math.ceil(UPLOAD_S / job_s))


def jobs_in_flight(max_rows: int, job_s: float) -> tuple[int, int]:
    """A worker's slots: how many are open to all jobs, and how many more are reserved for urgent ones.

    `max_rows`: rows of a step, >= 1. `job_s`: seconds of the device's time for a job in full batches, > 0.
    """
    open_to_all = JOBS_PER_ROW * max_rows + uploading_jobs(max_rows, job_s)
    return open_to_all, max(1, max_rows // ROWS_PER_RESERVED_SLOT)


class Slots:
    """The slots of a worker whose steps have so many rows, as far as it is known now. Any thread may ask."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def now(self) -> tuple[int, int]:
        """As `jobs_in_flight`. Follows the rows of steps, also when these are compiled later."""
        return jobs_in_flight(self._sizes.max_rows, self._sizes.job_s)

    @property
    def most(self) -> int:
        """No fewer than there will ever be, reserved ones included: threads are made when they are needed."""
        rows = max(self._sizes.max_rows, BATCH_SIZES[-1])
        return sum(jobs_in_flight(rows, UPLOAD_S / rows))

    def reason(self) -> str:
        """Why there are as many as now, for the log."""
        rows = self._sizes.max_rows
        return (
            f"{JOBS_PER_ROW} for each row of a step and {uploading_jobs(rows, self._sizes.job_s)} being "
            f"uploaded; {self.now()[1]} more slots are reserved for urgent jobs"
        )
