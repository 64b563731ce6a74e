"""Simulates policies under load from measured costs: random arrivals, latencies, capacity.

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
    """A finished job of a benchmark."""

    steps: int
    #: When it arrived and when its picture was delivered, seconds after the start.
    arrived_s: float
    left_s: float


def arrivals(jobs: int, per_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals of `per_s` jobs/s; infinity: all at once. A seed gives the same jobs at any rate.

    Of each three jobs, one has each number of steps, in random order.
    """
    rng = random.Random(seed)
    steps: list[int] = []
    while len(steps) < jobs:
        steps += rng.sample(MIX, len(MIX))
    at_s, arriving = 0.0, []
    for number in range(jobs):
        at_s += rng.expovariate(1.0) / per_s
        arriving.append(Arrival(at_s, steps[number]))
    return arriving


@dataclass(eq=False)
class _Job:
    job_id: str
    arrival: Arrival
    done: int = 0

    @property
    def left(self) -> int:
        return self.arrival.steps - self.done


def simulate(batcher: Batcher[Any], arriving: Sequence[Arrival], device: Device) -> list[Finished]:
    """The jobs in the order of arrival, finished by `batcher` on `device`: the engine's loop, simulated.

    Decoding takes time of the device between steps. Encoding of texts takes none.
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
    """`done` (in the order of arrival) if all pictures of a batch are delivered with the last one."""
    held = list(done)
    for batch in batches:
        numbers = [int(job_id) for job_id in batch]
        last_s = max(done[number].left_s for number in numbers)
        for number in numbers:
            held[number] = replace(done[number], left_s=last_s)
    return held


def runs(name: str, batcher: Batcher[Any], done: Sequence[Finished]) -> dict[str, list[Finished]]:
    """The results of a run of the policy `name`, by the names they are reported under."""
    if not isinstance(batcher, Static):
        return {name: list(done)}
    held = {name: together(done, batcher.batches)}
    return held | {EARLY: list(done)} if name == STATIC else held


@dataclass(frozen=True)
class Figures:
    """Latencies of jobs, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Point:
    """The result of a policy at a load."""

    #: Share of smallcat's capacity.
    load: float
    policy: str
    jobs: int
    #: Throughput in images/s; None: not run, because the load is above the policy's capacity.
    per_s: float | None
    #: Latencies of "all" jobs, and of those of each number of steps.
    latency: dict[str, Figures]
    #: Seconds of its steps over the measured costs; None: simulated.
    slowed: float | None = None

    @classmethod
    def past_capacity(cls, load: float, policy: str) -> Self:
        """A load at which the queue would grow without end."""
        return cls(load, policy, 0, None, {})

    @classmethod
    def of(cls, load: float, policy: str, done: Sequence[Finished], *, slowed: float | None = None) -> Self:
        """The figures of a run."""
        groups = {"all": [*done]} | {str(steps): [job for job in done if job.steps == steps] for steps in MIX}
        latency = {
            name: Figures(float(np.mean(seconds)), *np.percentile(seconds, [50, 95, 99]).tolist())
            for name, jobs in groups.items()
            if (seconds := [job.left_s - job.arrived_s for job in jobs])
        }
        per_s = len(done) / max(job.left_s for job in done)
        return cls(load, policy, len(done), per_s, latency, slowed)


def capacity(make: Callable[[Device], Batcher[Any]], device: Device) -> float:
    """Simulated throughput of a policy on `device`, in jobs/s, while jobs are always waiting."""
    jobs = 3 * max(100, 12 * device.slots)
    done = simulate(make(device), arrivals(jobs, float("inf"), seed=0), device)
    return jobs / max(job.left_s for job in done)


def simulated(
    device: Device, loads: Sequence[float], jobs: int, seed: int
) -> tuple[dict[str, float], list[Point]]:
    """The capacity of each policy in jobs/s, and its points: long simulated runs on the measured costs."""
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
            results = runs(name, batcher, simulate(batcher, arriving, device))
            points += [Point.of(load, policy, done) for policy, done in results.items()]
        alone = [
            Finished(
                each.steps, each.at_s, each.at_s + each.steps * device.step_s(None, ROWS) + device.decode_s(1)
            )
            for each in arriving
        ]
        points.append(Point.of(load, "alone", alone))
    return capacities, points
