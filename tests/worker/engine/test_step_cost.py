"""The cap follows from the measured curve, and from nothing else."""

from __future__ import annotations

import pytest

from worker.engine.step_cost import LEAST, ROWS, StepCost, choose, is_over, pays


@pytest.mark.parametrize(
    ("curve", "cap"),
    [
        # A GPU at 512 px: a row costs less and less until 32 of them fill it.
        ([(1, 22.0), (2, 23.4), (4, 25.0), (8, 28.8), (16, 53.0), (32, 96.0), (64, 190.0)], 32),
        # At 1024 px one row fills it: twice as many take twice as long.
        ([(1, 100.0), (2, 199.0), (4, 396.0)], LEAST),
        # One point that does not pay, by noise, hides none that does.
        ([(1, 10.0), (2, 16.0), (4, 33.0), (8, 40.0)], 8),
        # Nothing fits, or only one row.
        ([], LEAST),
        ([(1, 10.0)], LEAST),
    ],
)
def test_the_cap_is_where_more_rows_no_longer_pay(curve: list[tuple[int, float]], cap: int) -> None:
    chosen, reason = choose(curve)
    assert chosen == cap
    for rows, _ in curve:
        assert f"{rows}: " in reason


def test_measuring_goes_on_past_one_point_that_does_not_pay() -> None:
    assert pays([(1, 10.0)])
    assert not is_over([(1, 10.0)])
    assert not is_over([(1, 10.0), (2, 20.0)])
    assert is_over([(1, 10.0), (2, 20.0), (4, 40.0)])
    assert not is_over([(1, 10.0), (2, 20.0), (4, 30.0)])


def test_larger_pictures_get_fewer_rows_and_smaller_ones_more() -> None:
    cost = StepCost((), 64 * 64, 32)
    assert cost.cap(64 * 64) == 32
    assert cost.cap(128 * 128) == 8
    assert cost.cap(32 * 32) == ROWS[-1]
    assert cost.cap(1000 * 1000) == 1


@pytest.mark.parametrize(
    ("rows", "area", "seconds"),
    [
        (1, 100, 7.0),
        (2, 100, 8.0),
        # Between two measured points, and beyond the last.
        (3, 100, 10.0),
        (4, 100, 12.0),
        (8, 100, 24.0),
        # A row of twice the area is two rows' work; half a row costs as much as one: launches do.
        (1, 200, 8.0),
        (1, 50, 7.0),
    ],
)
def test_a_step_costs_what_was_measured_and_what_lies_between(rows: int, area: int, seconds: float) -> None:
    cost = StepCost(((1, 7.0), (2, 8.0), (4, 12.0)), 100, 4)
    assert cost.seconds(rows, area) == pytest.approx(seconds)


def test_where_nothing_was_measured_each_row_costs_the_same() -> None:
    cost = StepCost((), 100, 4)
    assert cost.seconds(2, 100) == 2 * cost.seconds(1, 100) == cost.seconds(1, 200)
