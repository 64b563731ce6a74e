"""When a notification is tried again, and when it is given up. Pure: the chance is passed in."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Final

_MINUTE, _HOUR = 60, 3_600
#: Seconds after each attempt that failed: about three days in all, as Standard Webhooks advises.
PAUSES_S: Final = (
    *(5, 30, 5 * _MINUTE, 30 * _MINUTE),
    *(2 * _HOUR, 5 * _HOUR, 10 * _HOUR, 14 * _HOUR, 20 * _HOUR, 24 * _HOUR),
)
#: A pause is up to so much longer or shorter, so that what failed together does not come back together.
JITTER: Final = 0.2
#: Seconds that a receiver may ask for, at most.
LONGEST_S: Final = 24 * _HOUR
#: "Gone": the receiver wants nothing more.
GONE: Final = 410


def pause_s(attempts: int, chance: float, asked_s: float = 0.0) -> float | None:
    """Seconds until the next attempt after `attempts` that failed, >= 1; None: it is given up.

    `chance` is 0 to 1. `asked_s`: what the receiver asked for by Retry-After, kept up to a day.
    """
    if attempts > len(PAUSES_S):
        return None
    return max(PAUSES_S[attempts - 1] * (1 + JITTER * (2 * chance - 1)), min(asked_s, LONGEST_S))


def asked_s(retry_after: str, now: float) -> float:
    """The seconds of a Retry-After header, a number or a date, at `now` in Unix seconds; 0: it is neither."""
    text = retry_after.strip()[:100]
    if text.isascii() and text.isdigit():
        return float(min(int(text), LONGEST_S))
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
