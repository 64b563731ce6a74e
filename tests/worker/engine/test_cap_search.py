"""The batch size that compiled steps gain by, found by steps of jobs."""

from __future__ import annotations

import pytest

from worker.engine.batcher import Batcher
from worker.engine.cap_search import COLD, MOST_STEPS, MOST_TRIES, CapSearch
from worker.engine.step_cost import Curve

#: Milliseconds of a compiled step by rows: up to 16 rows each size gains.
COMPILED = {2: 36.0, 4: 64.0, 8: 120.0, 16: 224.0, 32: 446.0, 64: 890.0}


def searched(search: CapSearch, usual: int, most: int, steps: int = 2_000) -> tuple[Curve | None, int]:
    """The curve, and the steps that it took, where at most so many rows ever wait."""
    cold: dict[int, int] = {}
    for step in range(steps):
        rows = min(search.cap or usual, most)
        seconds = COMPILED[rows] / 1e3
        # The first steps of a size choose kernels, or capture.
        cold[rows] = cold.get(rows, 0) + 1
        if cold[rows] <= COLD:
            seconds *= 3
        if (curve := search.note(rows, seconds, is_full=rows >= usual)) is not None:
            return curve, step + 1
    return None, steps


def test_each_size_is_tried_until_larger_ones_gain_nothing() -> None:
    search = CapSearch()
    assert search.cap is None
    curve, steps = searched(search, 8, 64)
    assert curve == [(rows, ms / 1e3) for rows, ms in COMPILED.items()][: len(curve or ())]
    assert curve is not None
    assert 32 in dict(curve)
    # A few steps of each: nobody waits long for it.
    assert steps < 50
    assert search.cap is None
    assert not search.gave_up


def test_nothing_is_tried_while_there_is_less_work_than_a_batch_holds() -> None:
    search = CapSearch()
    assert searched(search, 8, 4, steps=500) == (None, 500)
    assert search.cap is None


def test_a_size_for_which_there_are_too_few_jobs_is_given_up() -> None:
    search = CapSearch()
    curve, steps = searched(search, 8, 8)
    assert curve is not None
    assert [rows for rows, _ in curve] == [2, 4, 8]
    assert search.gave_up
    assert steps < 60 + MOST_TRIES * (MOST_STEPS + 2)


class Device:
    """What a batcher asks."""

    rows = 8

    def cap(self, lane: object) -> int:
        return self.rows

    def most(self, lane: object) -> int:
        return self.rows

    def step_s(self, lane: object, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        return 1.0


@pytest.mark.parametrize("rows", [2, 8, 16])
def test_batches_follow_the_cap_although_their_lane_is_never_empty(rows: int) -> None:
    """More jobs wait than any batch holds, as at saturation."""
    device = Device()
    batcher: Batcher[int] = Batcher(device)
    for number in range(40):
        batcher.add(number, lane="lane", rows=2, priority=5, now_s=0.0)
    assert len(batcher.next_batch(0.0)) == 4
    device.rows = rows
    assert len(batcher.next_batch(0.0)) == rows // 2
    # What did not fit in memory stays as it is.
    batcher.lower_cap("lane", 4)
    assert len(batcher.next_batch(0.0)) == 1
