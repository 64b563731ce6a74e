"""The measured cost of a step by its rows, and the batch size that follows from it. No torch.

A step of more rows takes longer, but less time for each row, until the device is fully used. Beyond that a
larger batch only makes its jobs wait for each other. Where that point lies depends on the device, the model
and the size of the pictures, so it is measured. Just before it there is a size that gains a little more: it
is for when so many jobs wait that throughput is what each of them waits for (`worker.engine.batcher`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: A batch of twice the size must lower the time of a row by at least this share.
MIN_GAIN = 0.03
#: The same for a batch while many jobs wait. Less is noise.
MIN_GAIN_OF_MANY = 0.01
#: Batch sizes that are measured, in rows, as far as they fit in memory and gain.
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
#: By what share of itself a row costs more for each more window of text that it attends to. Measured: 0.01 to
#: 0.016 on an H200 (docs/performance.md, "Long prompts").
TEXT_SHARE = 0.02
#: The cap of a device that gains nothing from larger batches: the two rows of a guided job.
MIN_CAP = 2

#: (rows, seconds a step), by rows.
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class StepCost:
    """The cost of steps over latents of any size, from a curve that was measured at one size.

    A device is fully used, and runs out of memory, at about the same number of latent pixels. So a row of
    twice the area counts as two rows.
    """

    #: The measured curve; empty: nothing was measured, and each row costs the same.
    curve: Curve
    #: Latent pixels of a row when it was measured.
    area: int
    #: The cap of a step of that size in rows, >= 1.
    max_rows: int
    #: By what share of itself a row with LoRAs costs more.
    lora_share: float = 0.0
    #: The cap while many jobs wait, >= `max_rows`; 0: the same.
    most_rows: int = 0

    def cap(self, area: int) -> int:
        """The cap of a step over latents of `area` pixels: rows of the same total area, >= 1."""
        return self._of_area(self.max_rows, area)

    def most(self, area: int) -> int:
        """The same while many jobs wait."""
        return self._of_area(max(self.max_rows, self.most_rows), area)

    def _of_area(self, rows: int, area: int) -> int:
        return max(1, min(BATCH_SIZES[-1], rows * self.area // area))

    def seconds(self, rows: int, area: int, more_windows: float = 0.0, lora_rows: int = 0) -> float:
        """The cost of a step of `rows` rows of `area` pixels, by linear interpolation.

        `more_windows`: by how many of the text encoder's windows the longest text is longer than one.
        `lora_rows`: rows with LoRAs.
        In seconds if a curve was measured, otherwise in rows of the default area.
        """
        work = (rows + self.lora_share * lora_rows) * area / self.area * (1 + TEXT_SHARE * more_windows)
        if not self.curve:
            return work
        before_rows, before_s = 0, self.curve[0][1]
        for at, seconds in self.curve:
            if work <= at:
                return before_s + (seconds - before_s) * (work - before_rows) / (at - before_rows)
            before_rows, before_s = at, seconds
        return before_s * work / before_rows


def gains(curve: Curve) -> bool:
    """Whether the last batch size of `curve` gains at least `MIN_GAIN` a row over the one before it."""
    if len(curve) < 2:
        return True
    (few, few_s), (many, many_s) = curve[-2:]
    return many_s / many <= (1 - MIN_GAIN) * few_s / few


def choose_cap(curve: Curve) -> tuple[int, str]:
    """The largest batch size in rows that still gains, at least `MIN_CAP`; and why, with the curve."""
    cap = MIN_CAP
    for points in range(2, len(curve) + 1):
        if gains(curve[:points]):
            cap = max(cap, curve[points - 1][0])
    measured = ", ".join(f"{rows}: {1e3 * seconds / rows:.3g}" for rows, seconds in curve)
    return (
        cap,
        f"larger batches gain less than {MIN_GAIN:.0%} a row; measured ms a row by batch size: {measured}",
    )


def choose_most(curve: Curve, cap: int) -> int:
    """The cap while many jobs wait: the measured batch size that takes the least time a row, >= `cap`.

    It is `cap` itself unless the gain over that is at least `MIN_GAIN_OF_MANY`.
    """
    a_row = {rows: seconds / rows for rows, seconds in curve if rows >= cap}
    if cap not in a_row:
        return cap
    best = min(a_row, key=lambda rows: a_row[rows])
    return best if a_row[best] <= (1 - MIN_GAIN_OF_MANY) * a_row[cap] else cap


def is_past_gain(curve: Curve) -> bool:
    """Whether larger batch sizes need no measuring: the last two did not gain. A single one may be noise."""
    return not gains(curve) and not gains(curve[:-1])
