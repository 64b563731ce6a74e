"""A worker has enough jobs in flight to keep its device busy."""

from __future__ import annotations

import pytest

from tests.worker.engine.fake_runner import FakeRunner
from worker.engine.capacity import JOBS_PER_ROW, Slots, jobs_in_flight, uploading_jobs


@pytest.mark.parametrize(
    ("max_rows", "job_s", "expected"),
    [
        # 50 steps, 20 steps, LCM and one step on a GPU: the shorter a job, the more are being uploaded.
        (16, 0.207, (34, 8)),
        (16, 0.083, (36, 8)),
        (16, 0.008, (48, 8)),
        (16, 0.002, (48, 8)),
        (2, 5.0, (5, 1)),
        (1, 1e-9, (3, 1)),
    ],
)
def test_as_many_jobs_are_in_flight_as_keep_the_device_busy(
    max_rows: int, job_s: float, expected: tuple[int, int]
) -> None:
    assert jobs_in_flight(max_rows, job_s) == expected
    assert uploading_jobs(max_rows, job_s) == expected[0] - JOBS_PER_ROW * max_rows


def test_slots_follow_the_rows_that_steps_have_once_they_are_compiled() -> None:
    device = FakeRunner(max_rows=8)
    slots = Slots(device)
    before = slots.now()
    assert before == jobs_in_flight(8, device.job_s)
    device.max_rows = 16
    assert slots.now() == jobs_in_flight(16, device.job_s) > before
    device.max_rows = 64
    assert sum(slots.now()) <= slots.most
    assert f"{JOBS_PER_ROW} for each row" in slots.reason()
