"""Hours of work leave a worker as it was: memory, connections, threads, files, latency. `make soak`."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass

import psutil
import pytest

from tests.faults import oracle
from tests.faults.harness import Ground

#: Minutes of work, after the first tenth, in which caches fill.
MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
#: Jobs a second: well below what two cores and the S3 server do, so that no queue builds up.
RATE = 5.0
#: What the last quarter may have more than the first: a connection that is made anew may count twice.
SLACK = {"memory_mib": 10.0, "connections": 2, "threads": 1, "files": 2, "clients": 2}


@dataclass(frozen=True)
class Sample:
    """A worker at one moment."""

    memory_mib: float
    connections: int
    threads: int
    files: int
    #: Connections that Redis has, from anybody.
    clients: int


def sample(ground: Ground, process: psutil.Process) -> Sample:
    with ground.redis as client:
        clients = int(client.info("clients")["connected_clients"])
    return Sample(
        process.memory_info().rss / 2**20,
        len(process.net_connections("tcp")),
        process.num_threads(),
        process.num_fds(),
        clients,
    )


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES * 1.5 + 300)
def test_soak(ground: Ground) -> None:
    """Good jobs, and one in twenty that raises; connections are cut once a minute."""
    worker = ground.worker(settings={"SMALLCAT_MAX_ATTEMPTS": "1"})
    process = psutil.Process(worker.pid)
    samples: list[Sample] = []
    with ground.feeding(RATE, lambda number: "" if number % 20 else "raise:Exception@step") as feeder:
        ends_s = time.monotonic() + 60 * MINUTES
        cut_s = time.monotonic() + 60
        while time.monotonic() < ends_s:
            time.sleep(60 * MINUTES / 60)  # The soak itself.
            samples.append(sample(ground, process))
            if time.monotonic() > cut_s:
                ground.cut_connections()
                cut_s += 60
    assert len(feeder.ids) > 0.9 * RATE * 60 * MINUTES, "the feeder paused: it was no soak"
    bad = {job_id for number, job_id in enumerate(feeder.ids) if number % 20 == 0}
    good = [job_id for job_id in feeder.ids if job_id not in bad]
    oracle.settle(ground, good)
    _say_and_judge(samples[len(samples) // 10 :], _latencies_ms(ground, good))
    assert worker.running
    assert process.pid == worker.pid
    oracle.no_slot_is_lost(ground, worker)


def _latencies_ms(ground: Ground, ids: list[str]) -> list[float]:
    """From fetching each job's message until its slot was free, in order of submission."""
    taken: dict[str, float] = {}
    left: dict[str, float] = {}
    for event in ground.journal.events():
        if event.what == "take":
            taken.setdefault(event.job, event.at_s)
        elif event.what == "leave":
            left[event.job] = event.at_s
    return [1000 * (left[job_id] - taken[job_id]) for job_id in ids]


def _say_and_judge(samples: list[Sample], latencies_ms: list[float]) -> None:
    """Compare the last quarter with the first: nothing grows."""
    quarter = len(samples) // 4
    early, late = samples[:quarter], samples[-quarter:]
    for name, slack in (
        ("memory_mib", 10.0),
        ("connections", 2),
        ("threads", 1),
        ("files", 2),
        ("clients", 2),
    ):
        was = statistics.median(getattr(each, name) for each in early)
        now = statistics.median(getattr(each, name) for each in late)
        print(f"{name}: {was:.1f} in the first quarter, {now:.1f} in the last")
        assert now <= was + slack, name
    part = len(latencies_ms) // 4
    was, now = statistics.median(latencies_ms[:part]), statistics.median(latencies_ms[-part:])
    print(
        f"latency: {was:.1f} ms in the first quarter, {now:.1f} ms in the last, of {len(latencies_ms)} jobs"
    )
    assert now <= 2 * was + 20
