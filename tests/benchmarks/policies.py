"""Batching policies to compare with smallcat's: which jobs share the next step.

A policy is a `Batcher` with another choice, so that the engine and the simulation run all of them in the same
loop. All jobs are guided and of one lane. Pure: no torch, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from worker.engine.batcher import Batcher, Costs
from worker.engine.step_cost import Curve, StepCost

#: Steps of the jobs, in equal parts, and rows of each job: all are guided.
MIX, ROWS = (20, 30, 50), 2
MEAN_STEPS = sum(MIX) / len(MIX)
#: The longest wait of static batches, as a share of the time that a full batch takes.
WINDOW = 0.1


class OneAtATime(Batcher[Any]):
    """One job at a time, in the order of arrival."""

    def next_batch(self, now_s: float) -> list[Any]:
        """The jobs to run one step of; empty when there are none."""
        return list(self)[:1]


class Named(Protocol):
    """A job in flight, in the engine or in the simulation."""

    @property
    def job_id(self) -> str:
        """The number of the job, in the order of arrival."""


class Static(Batcher[Any]):
    """Static batches of whole jobs: one starts when it is full or `window_s` is over, and no job joins it.

    The window (seconds) starts with the arrival of the first waiting job, so after a long batch the next one
    starts at once. Finished jobs take no part in later steps, unless the batch `is_padded`: then its steps
    cost the same to the end, as in a call of a pipeline, which has one shape (simulation only). Whether a
    finished picture is delivered at once or with its batch is decided later, see `simulation.together`.
    """

    def __init__(self, costs: Costs, window_s: float, *, is_padded: bool = False) -> None:
        super().__init__(costs)
        self._window_s = window_s
        self._is_padded = is_padded
        self._arrivals_s: dict[Named, float] = {}
        self._rows: dict[Named, int] = {}
        #: The running batch, with its finished jobs.
        self._batch: list[Named] = []
        #: The jobs of each batch, by id.
        self.batches: list[list[str]] = []

    def add(
        self, item: Named, *, lane: Hashable, rows: int, priority: int, now_s: float, **costs: int
    ) -> None:
        """Let `item` wait for a batch."""
        super().add(item, lane=lane, rows=rows, priority=priority, now_s=now_s, **costs)
        self._arrivals_s[item], self._rows[item] = now_s, rows

    def remove(self, item: Named) -> None:
        """Take `item` out."""
        super().remove(item)
        del self._arrivals_s[item], self._rows[item]

    def due_s(self) -> float:
        """When the window of the waiting jobs ends."""
        return min(self._arrivals_s.values()) + self._window_s

    def paid_rows(self) -> int:
        """Rows that a step of the running batch costs."""
        return ROWS * sum(self._is_padded or item in self for item in self._batch)

    def next_batch(self, now_s: float) -> list[Named]:
        """The jobs to run one step of; empty when there are none, and within the window."""
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
    """At each step, the jobs with the fewest steps left. Long jobs may wait for ever.

    If batching gains nothing, no policy has a lower mean latency (Schrage, 1968). Simulation only.
    """

    def next_batch(self, now_s: float) -> list[Any]:
        """The jobs to run one step of; empty when there are none."""
        return sorted(self, key=lambda job: job.left)[: max(1, self._costs.cap(None) // ROWS)]


@dataclass(frozen=True)
class Device:
    """The measured costs of a device: the `Costs` of a batcher, and those of decoding."""

    #: (rows, seconds a step) and (pictures, seconds to decode them together).
    step_curve: Curve
    decode_curve: Curve
    #: The cap of a step, in rows.
    rows: int
    #: The same in a crowded lane; 0: the same.
    most_rows: int = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """From the JSON of `asdict`."""
        steps, decoding = (tuple(map(tuple, values[name])) for name in ("step_curve", "decode_curve"))
        return cls(steps, decoding, values["rows"])

    def cap(self, lane: Hashable) -> int:
        """The same for all lanes."""
        return self.rows

    def most(self, lane: Hashable) -> int:
        """The same for all lanes."""
        return max(self.rows, self.most_rows)

    def step_s(self, lane: Hashable, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        """Seconds of a step."""
        return StepCost(self.step_curve, 1, self.rows).seconds(rows, 1)

    def decode_s(self, pictures: int) -> float:
        """Seconds to decode `pictures` in one call."""
        return StepCost(self.decode_curve, 1, self.rows).seconds(pictures, 1)

    @property
    def slots(self) -> int:
        """Jobs in a step, at most."""
        return max(1, self.rows // ROWS)

    @property
    def window_s(self) -> float:
        """The window of static batches: a share of the mean time of a full batch."""
        return WINDOW * MEAN_STEPS * self.step_s(None, self.rows)


ONE, STATIC, EARLY, PADDED, SMALLCAT = "one", "static", "static-early", "static-padded", "smallcat"
#: The policies that the engine can run. One run gives two results for static batches: pictures are delivered
#: with the whole batch (`STATIC`), or each when it is finished (`EARLY`).
POLICIES: dict[str, Callable[[Device], Batcher[Any]]] = {
    ONE: OneAtATime,
    STATIC: lambda device: Static(device, device.window_s),
    SMALLCAT: Batcher,
}
#: Policies for the simulation only.
OTHERS: dict[str, Callable[[Device], Batcher[Any]]] = {
    PADDED: lambda device: Static(device, device.window_s, is_padded=True),
    # Every job takes part in every step: processor sharing.
    "all-at-once": lambda device: Batcher(replace(device, rows=10**9)),
    "shortest-first": ShortestFirst,
}
