"""The cap follows from the measured curve, and from nothing else."""

from __future__ import annotations

import pytest

from worker.batch_cap import LEAST, ROWS, choose, is_over, pays, scaled


@pytest.mark.parametrize(
    ("curve", "cap"),
    [
        # A GPU at 512 px: a row costs less and less until 32 of them fill it.
        ([(1, 22.0), (2, 23.4), (4, 25.0), (8, 28.8), (16, 53.0), (32, 96.0), (64, 187.0)], 32),
        # At 1024 px one row fills it: twice as many take twice as long.
        ([(1, 100.0), (2, 196.0), (4, 390.0)], LEAST),
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
    assert scaled(32, 64 * 64, 64 * 64) == 32
    assert scaled(32, 64 * 64, 128 * 128) == 8
    assert scaled(8, 64 * 64, 256 * 256) == 1
    assert scaled(32, 64 * 64, 8 * 8) == ROWS[-1]
