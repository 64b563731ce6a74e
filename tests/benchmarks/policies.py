"""Which jobs share the next step: smallcat's way, other ways, and what each gives by simulation.

A policy is a `worker.batcher.Batcher` that chooses otherwise, so that engine and simulation run all of them
in the same loop, over the same arrivals. All jobs are of one lane. Pure: no torch, no threads, no clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from worker.batcher import Batcher, Costs
from worker.step_cost import Curve, StepCost

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


@dataclass(frozen=True)
class Arrival:
    """A job of a benchmark."""

    #: Seconds after the start.
    at_s: float
    steps: int


@dataclass(frozen=True)
class Finished:
    """What became of it."""

    steps: int
    #: When it came and when its picture was there, seconds after the start.
    arrived_s: float
    left_s: float


def arrivals(jobs: int, per_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals of `per_s` jobs a second; infinity: all at once. A seed gives the same at any pace.

    Among each three jobs, every number of steps is there once, in random order.
    """
    rng = random.Random(seed)
    steps: list[int] = []
    while len(steps) < jobs:
        steps += rng.sample(MIX, len(MIX))
    at_s, found = 0.0, []
    for number in range(jobs):
        at_s += rng.expovariate(1.0) / per_s
        found.append(Arrival(at_s, steps[number]))
    return found


@dataclass(eq=False)
class _Job:
    job_id: str
    arrival: Arrival
    done: int = 0

    @property
    def left(self) -> int:
        return self.arrival.steps - self.done


def simulate(batcher: Batcher[Any], arriving: Sequence[Arrival], device: Device) -> list[Finished]:
    """What `batcher` gives on `device`, in the order of arrival: the engine's loop with costs for its work.

    A picture is decoded on the device's time wherever it is decoded, and encoding texts costs nothing.
    """
    coming = [_Job(str(number), arrival) for number, arrival in enumerate(arriving)][::-1]
    left_s, now_s = [0.0] * len(arriving), 0.0
    while coming or len(batcher):
        while coming and coming[-1].arrival.at_s <= now_s:
            job = coming.pop()
            batcher.add(job, lane=None, rows=ROWS, priority=5, now_s=job.arrival.at_s)
        batch: list[_Job] = batcher.next_batch(now_s)
        if not batch:
            events = [coming[-1].arrival.at_s] if coming else []
            if isinstance(batcher, Static) and len(batcher):
                events.append(batcher.due_s())
            now_s = max(now_s, min(events))
            continue
        rows = batcher.paid_rows() if isinstance(batcher, Static) else ROWS * len(batch)
        now_s += device.step_s(None, rows)
        for job in batch:
            job.done += 1
        over = [job for job in batch if not job.left]
        for job in over:
            batcher.remove(job)
        if over:
            now_s += device.decode_s(len(over))
        for job in over:
            left_s[int(job.job_id)] = now_s
    return [Finished(each.steps, each.at_s, end) for each, end in zip(arriving, left_s, strict=True)]


def together(done: Sequence[Finished], batches: Sequence[Sequence[str]]) -> list[Finished]:
    """`done` (in the order of arrival) if every job leaves with the last one of its batch."""
    held = list(done)
    for batch in batches:
        places = [int(job_id) for job_id in batch]
        last_s = max(done[place].left_s for place in places)
        for place in places:
            held[place] = replace(done[place], left_s=last_s)
    return held


def runs(name: str, batcher: Batcher[Any], done: Sequence[Finished]) -> dict[str, list[Finished]]:
    """By the names they are told under, all that a run of the policy `name` shows."""
    if not isinstance(batcher, Static):
        return {name: list(done)}
    held = {name: together(done, batcher.batches)}
    return held | {EARLY: list(done)} if name == STATIC else held


@dataclass(frozen=True)
class Figures:
    """Latencies of some jobs, seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Point:
    """What a policy gave at a load."""

    #: Of smallcat's capacity.
    load: float
    policy: str
    jobs: int
    #: From the start to the last picture; None: more jobs would come than it can do, so it was not run.
    per_s: float | None
    #: Over "all" jobs, and over those of each number of steps.
    latency: dict[str, Figures]
    #: Seconds of its steps over what they cost; None: simulated.
    slowed: float | None = None

    @classmethod
    def past_capacity(cls, load: float, policy: str) -> Self:
        """Where the queue would grow without end, and latencies with the length of the run."""
        return cls(load, policy, 0, None, {})

    @classmethod
    def of(cls, load: float, policy: str, done: Sequence[Finished], *, slowed: float | None = None) -> Self:
        """From a run."""
        groups = {"all": [*done]} | {str(steps): [job for job in done if job.steps == steps] for steps in MIX}
        latency = {
            name: Figures(float(np.mean(seconds)), *np.percentile(seconds, [50, 95, 99]).tolist())
            for name, jobs in groups.items()
            if (seconds := [job.left_s - job.arrived_s for job in jobs])
        }
        per_s = len(done) / max(job.left_s for job in done)
        return cls(load, policy, len(done), per_s, latency, slowed)


def capacity(make: Callable[[Device], Batcher[Any]], device: Device) -> float:
    """Jobs a second that a policy has on `device` while more are waiting than it can seat, by simulation."""
    jobs = 3 * max(100, 12 * device.seats)
    done = simulate(make(device), arrivals(jobs, float("inf"), seed=0), device)
    return jobs / max(job.left_s for job in done)


def simulated(
    device: Device, loads: Sequence[float], jobs: int, seed: int
) -> tuple[dict[str, float], list[Point]]:
    """Capacity of each policy, jobs a second, and its points: long runs on the measured costs."""
    policies = {**POLICIES, **OTHERS}
    capacities = {name: capacity(make, device) for name, make in policies.items()}
    points = []
    for load in loads:
        per_s = load * capacities[SMALLCAT]
        arriving = arrivals(jobs, per_s, seed)
        for name, make in policies.items():
            if per_s >= capacities[name]:
                points.append(Point.past_capacity(load, name))
                continue
            batcher = make(device)
            told = runs(name, batcher, simulate(batcher, arriving, device))
            points += [Point.of(load, policy, done) for policy, done in told.items()]
        alone = [
            Finished(
                each.steps, each.at_s, each.at_s + each.steps * device.step_s(None, ROWS) + device.decode_s(1)
            )
            for each in arriving
        ]
        points.append(Point.of(load, "alone", alone))
    return capacities, points
