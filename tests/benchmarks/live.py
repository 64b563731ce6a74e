"""How long a live job takes while a file of a million prompts runs, against an idle queue.

    python -m tests.benchmarks.live                 15 live jobs each, on the bundled model
    python -m tests.benchmarks.live --jobs 30

A stack of its own, with one worker of a real model. A live job is what `submit_job` sends: its latency is the
time until its result is known here, its picture in the bucket. They are sent one after the other, first on an
idle queue, then while `smallcat ingest` has the worker full and its thousands queued behind. Prints one JSON
object; `limit_s` is what is promised, 1.5 times the idle latency and one step of the worker's full batch.
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
#: Jobs that have to be queued before live ones are sent, and steps of full batches that are timed then.
QUEUED, STEPS = 5_000, 60
#: Seconds between two looks at what is waited for, and until it is waited for in vain.
LOOK_S, TIMEOUT_S = 0.1, 240.0


def latencies(jobs: int, name: str) -> list[float]:
    """Seconds from submission to result of live jobs, one at a time."""
    taken = []
    for number in range(jobs):
        began = time.perf_counter()
        submit_job(f"a {name} cat, number {number}", seed=number).result(timeout=TIMEOUT_S)
        taken.append(time.perf_counter() - began)
    return taken


class Steps:
    """The worker's own count of its steps."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def read(self) -> tuple[float, float, float]:
        """Steps so far, their seconds and their rows."""
        with urllib.request.urlopen(self._url, timeout=10) as answer:  # noqa: S310 - our own worker
            text = answer.read().decode()
        names = ("step_seconds_count", "step_seconds_sum", "step_rows_sum")
        found = [re.search(rf"^smallcat_{name} (\S+)$", text, re.MULTILINE) for name in names]
        count, seconds, rows = (float(match[1]) if match else 0.0 for match in found)
        return count, seconds, rows


def wait_for(happened: Callable[[], bool]) -> None:
    """Return when it has; raises `TimeoutError` when it has not for too long."""
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Nothing came of it within {TIMEOUT_S:g} s.")
        time.sleep(LOOK_S)


@contextlib.contextmanager
def file_running(stack: Stack, folder: Path) -> Iterator[None]:
    """A million prompts on their way, thousands of them in the queue."""
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
        wait_for(lambda: ingest.poll() is not None or sum(map(fleet.length, queues)) >= QUEUED)
        if ingest.poll() is not None:
            raise RuntimeError(f"The file's run ended with exit code {ingest.returncode}.")
        yield
    finally:
        ingest.kill()
        ingest.wait()
        redis.close()


@click.command()
@click.option("--jobs", default=15, show_default=True, type=click.IntRange(1), help="Live jobs of each kind.")
def main(jobs: int) -> None:
    """Measure, and print one JSON object."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["SMALLCAT_METRICS_PORT"] = str(port)
    with Stack() as stack, tempfile.TemporaryDirectory() as folder:
        os.environ |= stack.variables
        steps = Steps(port)
        latencies(2, "first")  # Connections are made, caches are warm.
        idle = latencies(jobs, "sleeping")
        with file_running(stack, Path(folder)):
            before = steps.read()
            wait_for(lambda: steps.read()[0] - before[0] >= STEPS)
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
