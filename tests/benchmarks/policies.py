"""Which jobs share the next step: smallcat's way, and others to compare it with.

A policy is a `Batcher` that chooses otherwise, so that engine and simulation run them in the same
loop.All jobs are of one lane, and guided. Pure: no torch, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from worker.engine.batcher import Batcher, Costs
from worker.engine.step_cost import Curve, StepCost

#: Steps of the jobs, in equal parts, and the rows of each: all are guided.
MIX, ROWS = (20, 30, 50), 2
MEAN_STEPS = sum(MIX) / len(MIX)
#: The window of static batches, as a part of the time that a full batch takes.
WINDOW = 0.1


class OneAtATime(Batcher[Any]):
    """The job that came first runs alone until it is finished."""

    def next_batch(self, now_s: float) -> list[Any]:
        """The jobs to run one step of; empty when idle."""
        return list(self)[:1]


class Named(Protocol):
    """A job on board, in the engine or in the simulation."""

    @property
    def job_id(self) -> str:
        """The number of its arrival."""


class Static(Batcher[Any]):
    """Batches of whole jobs: filled until the cap or the end of the window, and nobody joins on the way.

    The window (`window_s`, seconds) begins when the first of those waiting came, so a batch starts at once
    behind a long one. A finished job costs its mates' further steps nothing, unless the batch `is_padded`:
    then these cost what the whole batch does, as where one call of a pipeline has one shape (only the
    simulation can tell). When its picture leaves is for the reader of `batches` to say; see `together`.
    """

    def __init__(self, costs: Costs, window_s: float, *, is_padded: bool = False) -> None:
        super().__init__(costs)
        self._window_s = window_s
        self._is_padded = is_padded
        self._arrivals_s: dict[Named, float] = {}
        self._rows: dict[Named, int] = {}
        #: The batch that runs, those who are finished among them.
        self._batch: list[Named] = []
        #: The jobs of each batch, by id.
        self.batches: list[list[str]] = []

    def add(self, item: Named, *, lane: Hashable, rows: int, priority: int, now_s: float) -> None:
        """Let `item` wait for a batch."""
        super().add(item, lane=lane, rows=rows, priority=priority, now_s=now_s)
        self._arrivals_s[item], self._rows[item] = now_s, rows

    def remove(self, item: Named) -> None:
        """Let `item` go."""
        super().remove(item)
        del self._arrivals_s[item], self._rows[item]

    def due_s(self) -> float:
        """When those waiting start at the latest, if nobody else comes."""
        return min(self._arrivals_s.values()) + self._window_s

    def paid_rows(self) -> int:
        """Rows that a step of the running batch costs."""
        return ROWS * sum(self._is_padded or item in self for item in self._batch)

    def next_batch(self, now_s: float) -> list[Named]:
        """The jobs to run one step of; empty when idle, and within the window."""
        running = [item for item in self._batch if item in self]
        if running or not self._rows:
            return running
        batch, rows = list[Named](), 0
        for item in self:
            if batch and rows + self._rows[item] > self._costs.cap(None):
                break
            batch.append(item)
            rows += self._rows[item]
        is_full = len(batch) < len(self) or rows >= self._costs.cap(None)
        if not is_full and now_s < self.due_s():
            return []
        self._batch = batch
        self.batches.append([item.job_id for item in batch])
        return list(batch)


class ShortestFirst(Batcher[Any]):
    """Seats go to those with the fewest steps to go, anew at each step, whatever becomes of the long ones.

    Where batching gains nothing, no policy has a lower mean latency (Schrage, 1968). Only for the simulation.
    """

    def next_batch(self, now_s: float) -> list[Any]:
        """The jobs to run one step of; empty when idle."""
        return sorted(self, key=lambda job: job.left)[: max(1, self._costs.cap(None) // ROWS)]


@dataclass(frozen=True)
class Device:
    """What a device costs, as measured: the `Costs` of a batcher, and decoding."""

    #: (rows, seconds a step) and (pictures, seconds to decode them together).
    step_curve: Curve
    decode_curve: Curve
    #: Rows of a step, at most.
    rows: int

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """The opposite of `asdict`, from JSON."""
        steps, decoding = (tuple(map(tuple, values[name])) for name in ("step_curve", "decode_curve"))
        return cls(steps, decoding, values["rows"])

    def cap(self, lane: Hashable) -> int:
        """The same for all."""
        return self.rows

    def step_s(self, lane: Hashable, rows: int) -> float:
        """Seconds of a step."""
        return StepCost(self.step_curve, 1, self.rows).seconds(rows, 1)

    def decode_s(self, pictures: int) -> float:
        """Seconds to decode so many pictures."""
        return StepCost(self.decode_curve, 1, self.rows).seconds(pictures, 1)

    @property
    def seats(self) -> int:
        """Jobs in a step, at most."""
        return max(1, self.rows // ROWS)

    @property
    def window_s(self) -> float:
        """The window of static batches: a part of what a full batch takes on the mean."""
        return WINDOW * MEAN_STEPS * self.step_s(None, self.rows)


ONE, STATIC, EARLY, PADDED, SMALLCAT = "one", "static", "static-early", "static-padded", "smallcat"
#: How to make each policy that the engine can run. The jobs of a static batch leave together (`STATIC`) or
#: each when it is finished (`EARLY`): the run is the same.
POLICIES: dict[str, Callable[[Device], Batcher[Any]]] = {
    ONE: OneAtATime,
    STATIC: lambda device: Static(device, device.window_s),
    SMALLCAT: Batcher,
}
#: Those for the simulation alone, to compare with.
OTHERS: dict[str, Callable[[Device], Batcher[Any]]] = {
    PADDED: lambda device: Static(device, device.window_s, is_padded=True),
    # Every job on board takes part in every step: processor sharing.
    "all-at-once": lambda device: Batcher(replace(device, rows=10**9)),
    "shortest-first": ShortestFirst,
}
