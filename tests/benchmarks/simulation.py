"""What a policy gives under load, by simulation of the measured costs: random arrivals, latencies, capacity.

Pure: no torch, no threads, no clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from tests.benchmarks.policies import EARLY, MIX, OTHERS, POLICIES, ROWS, SMALLCAT, STATIC, Device, Static
from worker.engine.batcher import Batcher


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
