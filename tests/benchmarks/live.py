"""Measures the latency of live jobs while a file of a million prompts runs, against an idle queue.

    python -m tests.benchmarks.live                 15 live jobs each, on the bundled model
    python -m tests.benchmarks.live --jobs 30

Starts a stack with one worker of a real model. A live job is one that `submit_job` sends. Its latency is the
time from its submission to its result, when its picture is in the bucket. Live jobs are sent one after the
other: first on an idle queue, then while `smallcat ingest` keeps the worker busy and has thousands of jobs
queued. Prints one JSON object. `limit_s` is the promised latency: 1.5 times the idle one, and one step of a
full batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from redis import Redis

from deploy.embedded.stack import Stack
from producer import submit_job
from worker.contract.queues import queues_of
from worker.state.fleet import Fleet

#: Lines of the file.
LINES = 1_000_000
#: Jobs that must be queued before live jobs are sent, and steps of full batches that are timed then.
QUEUED, STEPS = 5_000, 60
#: Seconds between two checks of a condition, and until the benchmark gives up.
POLL_S, TIMEOUT_S = 0.1, 240.0


def latencies(jobs: int, name: str) -> list[float]:
    """Seconds from submission to result of live jobs, sent one at a time."""
    taken = []
    for number in range(jobs):
        began = time.perf_counter()
        submit_job(f"a {name} cat, number {number}", seed=number).result(timeout=TIMEOUT_S)
        taken.append(time.perf_counter() - began)
    return taken


class Steps:
    """The step metrics of a worker."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def read(self) -> tuple[float, float, float]:
        """Steps so far, and the sums of their seconds and rows."""
        with urllib.request.urlopen(self._url, timeout=10) as answer:  # noqa: S310 - our own worker
            text = answer.read().decode()
        names = ("step_seconds_count", "step_seconds_sum", "step_rows_sum")
        found = [re.search(rf"^smallcat_{name} (\S+)$", text, re.MULTILINE) for name in names]
        count, seconds, rows = (float(match[1]) if match else 0.0 for match in found)
        return count, seconds, rows


def wait_for(is_met: Callable[[], bool], what: str) -> None:
    """Return when the condition is met. Raises `TimeoutError` after `TIMEOUT_S`."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_met():
        if time.monotonic() > deadline:
            raise TimeoutError(f"After {TIMEOUT_S:g} s there were still no {what}: is the worker too slow?")
        time.sleep(POLL_S)


@contextlib.contextmanager
def file_running(stack: Stack, folder: Path) -> Iterator[None]:
    """While a file of a million prompts is being ingested, with thousands of jobs in the queue."""
    file = folder / "prompts.txt"
    with file.open("w") as lines:
        lines.writelines(f"a photo of cat number {number}\n" for number in range(LINES))
    redis = Redis.from_url(stack.valkey.url, decode_responses=True)
    fleet = Fleet(redis, ttl_s=60)
    queues = queues_of(fleet.workers()[0].served)
    ingest = subprocess.Popen(
        [sys.executable, "-m", "producer", "ingest", str(file), "--seed-start", "1", "--json"],
        env=stack.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(
            lambda: ingest.poll() is not None or sum(map(fleet.length, queues)) >= QUEUED,
            f"{QUEUED} queued jobs",
        )
        if ingest.poll() is not None:
            raise RuntimeError(
                f"`smallcat ingest` ended with exit code {ingest.returncode} before it queued {QUEUED} jobs."
            )
        yield
    finally:
        ingest.kill()
        ingest.wait()
        redis.close()


@click.command(help=__doc__)
@click.option(
    "--jobs",
    default=15,
    show_default=True,
    type=click.IntRange(1),
    help="Live jobs on the idle queue, and as many beside the file.",
)
def main(jobs: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["SMALLCAT_METRICS_PORT"] = str(port)
    with Stack() as stack, tempfile.TemporaryDirectory() as folder:
        os.environ |= stack.variables
        steps = Steps(port)
        latencies(2, "first")  # Warms up connections and caches.
        idle = latencies(jobs, "sleeping")
        with file_running(stack, Path(folder)):
            before = steps.read()
            wait_for(lambda: steps.read()[0] - before[0] >= STEPS, f"{STEPS} steps")
            after = steps.read()
            busy = latencies(jobs, "hurried")
    count, seconds, rows = (late - early for early, late in zip(before, after, strict=True))
    idle_s, busy_s, step_s = statistics.median(idle), statistics.median(busy), seconds / count
    print(
        json.dumps(
            {
                "jobs": jobs,
                "idle_s": round(idle_s, 3),
                "busy_s": round(busy_s, 3),
                "busy_worst_s": round(max(busy), 3),
                "ratio": round(busy_s / idle_s, 2),
                "step_s": round(step_s, 3),
                "rows_a_step": round(rows / count, 1),
                "limit_s": round(1.5 * idle_s + step_s, 3),
                "holds": busy_s <= 1.5 * idle_s + step_s,
                "load": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()
