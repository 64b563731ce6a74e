"""When a notification is tried again: from seconds to a day, for about three days."""

from __future__ import annotations

import pytest

from producer.webhooks.schedule import JITTER, LONGEST_S, PAUSES_S, asked_s, pause_s


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_pauses_grow_from_seconds_to_a_day_and_end_after_about_three(chance: float) -> None:
    pauses = [pause_s(number, chance) for number in range(1, len(PAUSES_S) + 2)]
    assert pauses.pop() is None
    found = [each for each in pauses if each is not None]
    assert found == sorted(found)
    assert found[0] < 10
    assert abs(found[-1] - 86_400) <= 86_400 * JITTER
    assert 2.4 < sum(found) / 86_400 < 4


def test_what_a_receiver_asks_for_is_kept_up_to_a_day() -> None:
    assert pause_s(1, 0.5, 1_000) == 1_000
    assert pause_s(1, 0.5, 1e9) == LONGEST_S
    assert pause_s(9, 0.5, 1) == PAUSES_S[8]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        (" 5 ", 5),
        ("9" * 90, LONGEST_S),
        ("Thu, 01 Jan 1970 00:03:20 GMT", 100),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("", 0),
        ("-5", 0),
        ("soon", 0),
        ("٣", 0),
        ("Thu, 99 Foo 99999 00:00:00 GMT", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float) -> None:
    assert asked_s(text, 100.0) == seconds
