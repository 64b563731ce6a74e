"""How many rows a step should have at most: decided from the measured cost of steps. No torch.

A step of more rows costs more, but less for each, until the device is full: then a larger batch only makes
its jobs wait for each other. Where that is depends on device, model and size, so it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

#: How much less a row must cost in a batch twice as large for that batch to be worth it.
WORTH_IT = 0.05
#: Rows that are tried, as far as they fit and pay.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
#: The cap of a device for which more does not pay: a guided job's two rows.
LEAST = 2


def pays(curve: Sequence[tuple[int, float]]) -> bool:
    """Whether the last point of `curve`, (rows, seconds a step), is worth it against the one before."""
    if len(curve) < 2:
        return True
    (few, few_s), (many, many_s) = curve[-2:]
    return many_s / many <= (1 - WORTH_IT) * few_s / few


def choose(curve: Sequence[tuple[int, float]]) -> tuple[int, str]:
    """The most rows worth having in a step, at least `LEAST`, and why, with the curve."""
    cap = LEAST
    for points in range(2, len(curve) + 1):
        if pays(curve[:points]):
            cap = max(cap, curve[points - 1][0])
    told = ", ".join(f"{rows}: {1e3 * seconds / rows:.3g}" for rows, seconds in curve)
    return cap, f"more gain less than {WORTH_IT:.0%} a row; measured ms a row by rows: {told}"


def is_over(curve: Sequence[tuple[int, float]]) -> bool:
    """Whether there is no point in trying more rows. One point that does not pay may be noise."""
    return not pays(curve) and not pays(curve[:-1])


def scaled(cap: int, measured_area: int, area: int) -> int:
    """The cap for latents of another area than the measured one: as much work a step, at least one row.

    A device is full at about the same number of latent pixels, and runs out of memory likewise.
    """
    return max(1, min(ROWS[-1], cap * measured_area // area))
