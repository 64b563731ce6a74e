"""The cap of a batch follows from the measured curve alone."""

from __future__ import annotations

import pytest

from worker.engine.step_cost import (
    BATCH_SIZES,
    MIN_CAP,
    StepCost,
    choose_cap,
    choose_most,
    gains,
    is_past_gain,
)


@pytest.mark.parametrize(
    ("curve", "cap"),
    [
        # A GPU at 512 px: the time of a row falls until 32 rows use all of the GPU.
        ([(1, 22.0), (2, 23.4), (4, 25.0), (8, 28.8), (16, 53.0), (32, 96.0), (64, 190.0)], 32),
        # At 1024 px one row uses all of it: twice as many take twice as long.
        ([(1, 100.0), (2, 199.0), (4, 396.0)], MIN_CAP),
        # One point that does not gain, by noise, hides no later one that does.
        ([(1, 10.0), (2, 16.0), (4, 33.0), (8, 40.0)], 8),
        # Nothing fits, or only one row.
        ([], MIN_CAP),
        ([(1, 10.0)], MIN_CAP),
    ],
)
def test_the_cap_is_the_largest_batch_size_that_gains(curve: list[tuple[int, float]], cap: int) -> None:
    chosen, reason = choose_cap(curve)
    assert chosen == cap
    for rows, _ in curve:
        assert f"{rows}: " in reason


@pytest.mark.parametrize(
    ("ms_a_row", "cap", "most"),
    [
        # SD 1.x and SDXL on an H200 and an H100 (docs/performance.md).
        ({2: 3.30, 4: 2.50, 8: 2.28, 16: 2.16, 32: 2.09}, 16, 32),
        ({1: 17.7, 2: 17.7, 8: 15.9, 16: 15.5, 32: 15.6}, 8, 16),
        # What gains less than that is noise, and what costs more a row is never taken.
        ({8: 2.28, 16: 2.16, 32: 2.15}, 16, 16),
        ({8: 2.28, 16: 2.16, 32: 2.40}, 16, 16),
        # The cap was not measured.
        ({1: 10.0}, 2, 2),
        ({}, 2, 2),
    ],
)
def test_while_many_jobs_wait_the_size_of_least_time_a_row_is_the_cap(
    ms_a_row: dict[int, float], cap: int, most: int
) -> None:
    curve = [(rows, rows * each) for rows, each in ms_a_row.items()]
    assert choose_most(curve, cap) == most


def test_measuring_goes_on_past_one_batch_size_that_does_not_gain() -> None:
    assert gains([(1, 10.0)])
    assert not is_past_gain([(1, 10.0)])
    assert not is_past_gain([(1, 10.0), (2, 20.0)])
    assert is_past_gain([(1, 10.0), (2, 20.0), (4, 40.0)])
    assert not is_past_gain([(1, 10.0), (2, 20.0), (4, 30.0)])


def test_larger_pictures_get_fewer_rows_and_smaller_ones_more() -> None:
    cost = StepCost((), 64 * 64, 32)
    assert cost.cap(64 * 64) == 32
    assert cost.cap(128 * 128) == 8
    assert cost.cap(32 * 32) == BATCH_SIZES[-1]
    assert cost.cap(1000 * 1000) == 1
    assert cost.most(64 * 64) == 32
    many = StepCost((), 64 * 64, 16, most_rows=32)
    assert (many.cap(64 * 64), many.most(64 * 64)) == (16, 32)
    assert (many.cap(128 * 128), many.most(128 * 128)) == (4, 8)


@pytest.mark.parametrize(
    ("rows", "area", "seconds"),
    [
        (1, 100, 7.0),
        (2, 100, 8.0),
        # Between two measured points, and beyond the last.
        (3, 100, 10.0),
        (4, 100, 12.0),
        (8, 100, 24.0),
        # A row of twice the area costs as much as two rows; half a row as much as one, for its launches.
        (1, 200, 8.0),
        (1, 50, 7.0),
    ],
)
def test_a_step_costs_what_was_measured_or_is_interpolated(rows: int, area: int, seconds: float) -> None:
    cost = StepCost(((1, 7.0), (2, 8.0), (4, 12.0)), 100, 4)
    assert cost.seconds(rows, area) == pytest.approx(seconds)


def test_where_nothing_was_measured_each_row_costs_the_same() -> None:
    cost = StepCost((), 100, 4)
    assert cost.seconds(2, 100) == 2 * cost.seconds(1, 100) == cost.seconds(1, 200)


def test_rows_with_loras_cost_their_share_more() -> None:
    cost = StepCost([(1, 1.0), (8, 8.0)], 64, 8, lora_share=0.25)
    assert cost.seconds(8, 64, lora_rows=4) == pytest.approx(9.0)
    assert cost.seconds(8, 64) == pytest.approx(8.0)
