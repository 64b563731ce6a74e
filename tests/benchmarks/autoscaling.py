"""What scaling by the queue gives and costs, beside scaling by the processor's load: a simulation.

    python -m tests.benchmarks.autoscaling

The scaler is KEDA with the numbers of deploy/kubernetes/worker/scaling.yaml, and the autoscaler of Kubernetes
behind it as its documentation has it: every 15 s, ceil(value / threshold), the windows and policies of both
directions. The naive one is the same autoscaler on CPU utilisation: at least one GPU, 80% wanted, 10%
tolerance, five minutes' window down. A worker that renders uses all of the processor that it asks for, with
one job as with a full batch; an idle one a tenth.

The load of an hour, for so many GPUs: nothing for 10 minutes; 30 minutes of 60% of what all GPUs can do, with
a burst of as many jobs as all of them do in 2 minutes in its middle; then nothing. A GPU takes 30 s to start
(the node is there and the kernels are kept). Jobs wait in one queue, first in, first out, and each GPU has up
to BATCH of them together. The wait is from submission to picture. Cost is GPU time, from the asking for a
GPU to its giving back; one that is told to stop finishes its jobs.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

SCALING = Path(__file__).parents[2] / "deploy" / "kubernetes" / "worker" / "scaling.yaml"
#: SDXL, 1024 px, 30 steps on an H200: jobs in a full batch, and seconds of a picture, alone and for each job
#: of its batch. A full batch gives 0.881 pictures a second (docs/performance.md).
BATCH, ALONE_S, MORE_S = 8, 2.0, 0.885
RATE = BATCH / (ALONE_S + BATCH * MORE_S)
COLD_START_S, HOUR_S, TICK_S, SYNC_S = 30.0, 3600, 1.0, 15


@dataclass
class Gpu:
    """One worker: it takes jobs from when it is ready until it is told to stop, and then finishes them."""

    ready_s: float
    #: Of each job in its batch: when it was submitted, and what is left of it, 1 to 0.
    jobs: list[list[float]] = field(default_factory=list)


@dataclass
class Fleet:
    """The GPUs and the queue, a second at a time."""

    gpus: list[Gpu] = field(default_factory=list)
    #: Those that were told to stop and finish their jobs.
    draining: list[Gpu] = field(default_factory=list)
    #: When each job that waits was submitted.
    queue: deque[float] = field(default_factory=deque)
    #: Seconds of each job from its submission to its picture.
    waits: list[float] = field(default_factory=list)
    gpu_s: float = 0.0

    @property
    def jobs(self) -> int:
        """Jobs that wait and jobs in flight."""
        return len(self.queue) + sum(len(gpu.jobs) for gpu in [*self.gpus, *self.draining])

    def tick(self, now_s: float) -> None:
        """Fetch and render for one tick."""
        ready = [gpu for gpu in self.gpus if gpu.ready_s <= now_s]
        for _ in range(BATCH):
            for gpu in ready:
                if self.queue and len(gpu.jobs) < BATCH:
                    gpu.jobs.append([self.queue.popleft(), 1.0])
        for gpu in [*ready, *self.draining]:
            share = TICK_S / (ALONE_S + len(gpu.jobs) * MORE_S)
            for job in gpu.jobs:
                job[1] -= share
            self.waits += [now_s + TICK_S - since_s for since_s, left in gpu.jobs if left <= 0]
            gpu.jobs = [job for job in gpu.jobs if job[1] > 0]
        self.gpu_s += (len(self.gpus) + len(self.draining)) * TICK_S
        self.draining = [gpu for gpu in self.draining if gpu.jobs]

    def scale(self, wanted: int, now_s: float) -> None:
        """Ask for GPUs, or stop the newest."""
        while len(self.gpus) < wanted:
            self.gpus.append(Gpu(now_s + COLD_START_S))
        self.draining += [gpu for gpu in self.gpus[wanted:] if gpu.jobs]
        del self.gpus[wanted:]


def steps_allowed(policies: list[dict[str, Any]], now: int) -> int:
    """The largest change that one of the policies allows at a sync."""
    allowed = 0.0
    for policy in policies:
        of = now * policy["value"] / 100 if policy["type"] == "Percent" else policy["value"]
        allowed = max(allowed, of * SYNC_S / policy["periodSeconds"])
    return max(1, math.ceil(allowed))


class ByQueue:
    """KEDA, by what waits and what is in flight."""

    least = 0

    def __init__(self, most: int, threshold: int) -> None:
        self.name = f"by the queue, {threshold} jobs a GPU"
        self.spec = yaml.safe_load(SCALING.read_text())["spec"]
        self.most, self.threshold = most, threshold
        self.behavior = self.spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        window = self.behavior["scaleDown"]["stabilizationWindowSeconds"]
        self.recent: deque[int] = deque(maxlen=max(1, window // SYNC_S))
        self.idle_s = 0.0

    def wanted(self, fleet: Fleet) -> int:
        value, now = fleet.jobs, len(fleet.gpus)
        if value == 0:
            self.idle_s += SYNC_S
            if self.idle_s >= self.spec["cooldownPeriod"]:
                return 0
        else:
            self.idle_s = 0.0
        if now == 0:
            return int(value > 0)
        return self._within(max(1, min(self.most, math.ceil(value / self.threshold))), now)

    def _within(self, asked: int, now: int) -> int:
        self.recent.append(asked)
        if asked > now:
            return min(asked, now + steps_allowed(self.behavior["scaleUp"]["policies"], now))
        asked = max(self.recent)
        return (
            now
            if asked >= now
            else max(asked, now - steps_allowed(self.behavior["scaleDown"]["policies"], now))
        )


class ByProcessor:
    """The autoscaler of Kubernetes on CPU utilisation, with its defaults."""

    name = "by CPU, 80%"
    least = 1

    def __init__(self, most: int) -> None:
        self.most = most
        self.recent: deque[int] = deque(maxlen=300 // SYNC_S)

    def wanted(self, fleet: Fleet) -> int:
        now = len(fleet.gpus)
        use = statistics.mean(1.0 if gpu.jobs else 0.1 for gpu in fleet.gpus)
        ratio = use / 0.8
        asked = now if abs(ratio - 1) <= 0.1 else math.ceil(now * ratio)
        asked = max(self.least, min(self.most, asked))
        self.recent.append(asked)
        # Its default going up: as many again or 4 more, each 15 s.
        return min(asked, now + max(now, 4)) if asked > now else max(self.recent)


class AllTheTime:
    """As many as there may be, always."""

    name = "all, all the time"

    def __init__(self, most: int) -> None:
        self.least = self.most = most

    def wanted(self, fleet: Fleet) -> int:
        return self.most


def simulated(scaler: ByQueue | ByProcessor | AllTheTime) -> Fleet:
    """An hour of a fleet."""
    most, fleet, chance = scaler.most, Fleet(), random.Random(1)
    fleet.scale(scaler.least, -COLD_START_S)
    next_s, second = 600.0, 0
    while second < HOUR_S or fleet.jobs:
        while next_s < min(second + TICK_S, 2400):
            fleet.queue.append(next_s)
            next_s += chance.expovariate(0.6 * most * RATE)
        if second == 1500:
            fleet.queue.extend([second] * int(120 * most * RATE))
        fleet.tick(second)
        if second % SYNC_S == 0:
            fleet.scale(scaler.wanted(fleet), second)
        second += 1
    return fleet


def rows() -> Iterator[tuple[str, ...]]:
    """A row for each number of GPUs and way of scaling."""
    for most in (1, 10, 100):
        for scaler in (ByQueue(most, 8), ByQueue(most, 16), ByProcessor(most), AllTheTime(most)):
            fleet = simulated(scaler)
            waits = sorted(fleet.waits)
            yield (
                f"{most}",
                scaler.name,
                f"{statistics.mean(waits):.0f}",
                f"{waits[int(0.95 * len(waits))]:.0f}",
                f"{fleet.gpu_s / 3600:.2f}",
                f"{1000 * fleet.gpu_s / 3600 / len(waits):.2f}",
            )


HEADINGS = ("GPUs at most", "Scaled", "Mean wait, s", "95%, s", "GPU hours", "GPU hours a thousand jobs")


@click.command()
def main() -> None:
    """Print the table of docs/deployment.md."""
    print("\n".join(f"| {' | '.join(row)} |" for row in (HEADINGS, ["---"] * len(HEADINGS), *rows())))


if __name__ == "__main__":
    main()
