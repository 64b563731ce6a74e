"""Measures what a fleet costs its Redis.

    python -m tests.benchmarks.fleet --real 24 --simulated 976

The real workers are `celery worker` processes with a fake renderer (`tests.faults.app`), which put pictures
into a folder. The simulated ones send what such a worker sends while it is idle, and each fetches over a
connection of its own: its fetch every two seconds, its announcement, its look for leases that ran out, its
heartbeat for Flower.
Commands are those that Redis counts: those that scripts call are among them. CPU is Redis' own.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil
import pytest
import redis

from deploy.embedded.stack import Stack
from producer import submit_job
from tests.benchmarks.fleet_simulation import Simulation
from tests.faults.harness import Ground, slots, wait_until
from worker.state.keys import job_key

#: As a worker has it by default: the tests' lease is short, and is renewed often.
SETTINGS = {"SMALLCAT_LEASE_S": "30"}


class Cost(NamedTuple):
    """What Redis did in some seconds."""

    seconds: float
    commands: float
    cpu_ms: float
    bytes: float

    def less(self, idle: Cost) -> Cost:
        """Without what goes on anyway, measured as `idle`."""
        share = self.seconds / idle.seconds
        rest = (mine - share * theirs for mine, theirs in zip(self[1:], idle[1:], strict=True))
        return Cost(self.seconds, *rest)


class Meter:
    """Reads what Redis counts."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def _read(self) -> Cost:
        info: dict[str, Any] = self._client.info("everything")
        cpu_s = info["used_cpu_user"] + info["used_cpu_sys"]
        traffic = info["total_net_input_bytes"] + info["total_net_output_bytes"]
        return Cost(time.monotonic(), info["total_commands_processed"], 1e3 * cpu_s, traffic)

    @contextlib.contextmanager
    def measuring(self, costs: list[Cost]) -> Iterator[None]:
        """Append the cost of the block."""
        before = self._read()
        yield
        after = self._read()
        costs.append(Cost(*(new - old for old, new in zip(before, after, strict=True))))

    def idle(self, seconds: float) -> Cost:
        """The cost of so many seconds in which nothing is submitted."""
        costs: list[Cost] = []
        with self.measuring(costs):
            threading.Event().wait(seconds)
        return costs[0]

    def calls(self) -> dict[str, int]:
        """How often each command was called."""
        stats: dict[str, Any] = self._client.info("commandstats")
        return {name.removeprefix("cmdstat_"): int(each["calls"]) for name, each in stats.items()}


def connections(client: redis.Redis) -> int:
    """Connections of all other processes."""
    own = {each.laddr.port for each in psutil.Process().net_connections("tcp") if each.laddr}
    return sum(int(each["addr"].rpartition(":")[2]) not in own for each in client.client_list())


def lone_jobs(ground: Ground, meter: Meter, idle: Cost, jobs: int) -> dict[str, float]:
    """Jobs one by one, each submitted when all workers wait."""
    costs: list[Cost] = []
    took_s: list[float] = []
    with ground.redis as client:
        for _ in range(jobs):
            job = ground.job()
            with meter.measuring(costs):
                began = time.monotonic()
                submit_job(job)
                wait_until("done", lambda job=job: client.hget(job_key(job.id), "state") == "done")
                took_s.append(time.monotonic() - began)
                threading.Event().wait(0.2)  # Until all are waiting again.
    # Those that ask whether the job is done are not counted.
    polls = [seconds / 0.01 for seconds in took_s]
    alone = [cost.less(idle).commands - poll for cost, poll in zip(costs, polls, strict=True)]
    return {"commands": statistics.median(alone), "ms": 1e3 * statistics.median(took_s)}


def busy(ground: Ground, meter: Meter, idle: Cost, jobs: int) -> dict[str, Any]:
    """A queue of many jobs: submitted by `submit_job` while all slots are taken, then done.

    What is done is measured while the queue is never empty: from when the jobs that took the slots have ended
    until `jobs` more have. At both times all slots are taken. What Redis does beside idle workers is
    subtracted, but not from the calls.
    """
    costs: list[Cost] = []
    calls: Counter[str] = Counter()
    ended = lambda: ground.journal.total("leave")  # noqa: E731

    @contextlib.contextmanager
    def measuring() -> Iterator[None]:
        before = meter.calls()
        with meter.measuring(costs):
            yield
        calls.update({name: (count - before.get(name, 0)) / jobs for name, count in meter.calls().items()})

    with ground.holding() as hold:
        held = ground.submit(len(ground.workers) * slots(4), hold)
        ground.journal.wait_for("start", held)
        with measuring():
            ground.submit(jobs)
        ground.submit(2 * len(held))
        first = ended() + len(held)
    wait_until("the slots are free for them", lambda: ended() >= first, 60)
    first = ended()
    with measuring():
        wait_until("done", lambda: ended() >= first + jobs, 600)
        done_jobs = ended() - first
    wait_until("all done", lambda: ended() >= len(ground.ids), 600)
    wait_until("all acknowledged", lambda: ground.unsettled() == 0)
    submitted, done = (cost.less(idle) for cost in costs)
    return {
        "commands": submitted.commands / jobs + done.commands / done_jobs,
        "cpu_ms": submitted.cpu_ms / jobs + done.cpu_ms / done_jobs,
        "of them to submit": {"commands": submitted.commands / jobs, "cpu_ms": submitted.cpu_ms / jobs},
        "jobs_s": done_jobs / done.seconds,
        "calls": {name: round(count, 2) for name, count in sorted(calls.items()) if count >= 0.05},
    }


def submitting(ground: Ground, jobs: int) -> float:
    """Milliseconds of a `submit_job`, the median."""
    took = []
    for _ in range(jobs):
        job = ground.job()
        began = time.perf_counter()
        ground.ids.append(submit_job(job).id)
        took.append(1e3 * (time.perf_counter() - began))
    return statistics.median(took)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def run(ground: Ground, real: int, simulated: int, jobs: int, say: Callable[[str, Any], None]) -> None:
    """Measure with ever more workers; `say` takes a name and a figure."""
    with ground.redis as client:
        meter = Meter(client)
        empty = meter.idle(10)
        for _ in range(real):
            ground.worker(ready=False, rows=4, settings=SETTINGS, storage="folder", marks="0")
        wait_until("all workers", lambda: client.scard("smallcat:workers") >= real, 60 + 10 * real)
        threading.Event().wait(6)
        idle = meter.idle(10)
        alone = idle.less(empty)
        say("workers", real)
        say("connections of a worker", connections(client) / real)
        say("idle: commands a second and worker", alone.commands / idle.seconds / real)
        say("idle: Redis' CPU, ms a second and worker", alone.cpu_ms / idle.seconds / real)
        say("idle: kB a second, all workers", alone.bytes / idle.seconds / 1e3)
        say("submit_job, ms", submitting(ground, 100))
        wait_until("all done", lambda: ground.journal.total("leave") >= len(ground.ids), 120)
        threading.Event().wait(2)
        say("a lone job", lone_jobs(ground, meter, idle, 15))
        say("a busy queue, each job", busy(ground, meter, idle, jobs))
        say("connections of a worker after it", connections(client) / real)
        if not simulated:
            return
        with Simulation(ground.stack.valkey.url, simulated) as simulation:
            total = real + simulated
            wait_until("all announced", lambda: client.scard("smallcat:workers") >= total, 60)
            threading.Event().wait(6)
            idle = meter.idle(15)
            alone = idle.less(empty)
            say("workers", total)
            say("idle: Redis' CPU, ms a second and worker", alone.cpu_ms / idle.seconds / total)
            say("idle: kB a second, all workers", alone.bytes / idle.seconds / 1e3)
            say("submit_job, ms", submitting(ground, 100))
            # The simulator shares the machine's cores with the producer, as real workers would not.
            with simulation.standing_still():
                say("submit_job without the simulator's processor time, ms", submitting(ground, 100))
            wait_until("all done", lambda: ground.journal.total("leave") >= len(ground.ids), 120)


@click.command(help=__doc__)
@click.option("--real", default=8, show_default=True, help="Worker processes.")
@click.option("--simulated", default=0, show_default=True, help="Further workers that are simulated.")
@click.option("--jobs", default=2_000, show_default=True, help="Jobs of the busy queue.")
def main(real: int, simulated: int, jobs: int) -> None:
    def say(name: str, value: Any) -> None:
        print(json.dumps({name: rounded(value)}), flush=True)

    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        Stack(workers=0) as stack,
    ):
        ground = Ground(stack, Path(folder))
        os.environ.update({"OMP_NUM_THREADS": "1"})
        ground.use(patch)
        run(ground, real, simulated, jobs, say)


if __name__ == "__main__":
    main()
