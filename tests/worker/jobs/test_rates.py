"""Pictures a second and rows of a step, with the clock passed in."""

from __future__ import annotations

from worker.jobs.rates import WINDOW_S, Rates


def test_rates_are_of_the_last_minute_and_end_with_the_work() -> None:
    now_s = 100.0
    rates = Rates(clock=lambda: now_s)
    assert rates.lately() == (0.0, 0.0)
    for _ in range(120):  # Two pictures a second, of steps of 4 and 8 rows.
        rates.step(4, 0.1)
        rates.step(8, 0.1)
        rates.picture()
        now_s += 0.5
    pictures, rows = rates.lately()
    assert (round(pictures, 1), rows) == (2.0, 6.0)
    now_s += WINDOW_S / 2
    assert 0.5 < rates.lately()[0] < 1.5
    now_s += WINDOW_S
    assert rates.lately() == (0.0, 0.0)


def test_the_first_picture_is_no_high_rate() -> None:
    rates = Rates(clock=lambda: 5.0)
    rates.picture()
    assert rates.lately() == (0.5, 0.0)
