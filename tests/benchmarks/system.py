"""Measures the throughput of the whole system at saturation, from the queue to the bucket.

    python -m deploy.local -- python -m tests.benchmarks.system --jobs 200 --steps 50

Runs inside a stack with a worker; the environment names its queue and bucket. All jobs are submitted at once.
The first quarter and the last tenth of the pictures are not counted, so that neither the start nor the end of
the run matters. Pictures come in groups: the throughput is the slope of a line through all counted ones. A
picture counts when its job's record says that it is in the bucket. `tests.benchmarks.engine` with the same
options measures the engine alone, which is the upper bound.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from producer import JobHandle, submit_job

#: Shares of the pictures at the start and at the end that are not counted.
START_SHARE, END_SHARE = 0.25, 0.1


def run(jobs: int, seed: int = 0, **fields: Any) -> dict[str, float]:
    """Submit `jobs` jobs with these `fields` and seeds from `seed` on. Waits for all; returns the figures."""
    started_s = time.perf_counter()
    handles = [
        submit_job(f"a small cat, number {number % 50}", seed=number, **fields)
        for number in range(seed, seed + jobs)
    ]
    submitted_s = time.perf_counter()
    finished: list[float] = []
    lock = threading.Lock()

    def wait(handle: JobHandle) -> float:
        record = handle.result(timeout=900)
        with lock:
            finished.append(time.perf_counter())
        return record.timings.uploaded or 0.0

    with ThreadPoolExecutor(64) as pool:
        uploads = sorted(pool.map(wait, handles))
    counted = range(int(jobs * START_SHARE), int(jobs * (1 - END_SHARE)))
    return {
        "jobs": jobs,
        "images_s": statistics.linear_regression([finished[number] for number in counted], counted).slope,
        "submit_s": jobs / (submitted_s - started_s),
        "encode_and_upload_ms_median": 1e3 * uploads[jobs // 2],
        "whole_run_s": finished[-1] - started_s,
    }


@click.command(help=__doc__)
@click.option("--jobs", default=200, show_default=True, help="Jobs that are submitted.")
@click.option("--steps", type=int, help="Steps of a job; the model's default when not given.")
@click.option("--size", type=int, help="Side in pixels; the model's default when not given.")
@click.option("--guidance", "guidance_scale", type=float, help="Guidance scale.")
@click.option("--scheduler", help="Noise scheduler.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Seed of the first job. Jobs whose picture is in the bucket are not rendered.",
)
@click.option("--format", "image_format", default="png", show_default=True, help="Image format.")
@click.option("--name", default="system", help="Name in the output.")
def main(jobs: int, seed: int, size: int | None, image_format: str, name: str, **fields: Any) -> None:
    fields = {key: value for key, value in fields.items() if value is not None} | {"format": image_format}
    fields |= {"width": size, "height": size} if size else {}
    # A first job, of another seed, warms up the worker.
    submit_job("a small cat", seed=10**9 + seed, **fields).result(timeout=900)
    print(json.dumps({"name": name, **fields, **run(jobs, seed, **fields)}))


if __name__ == "__main__":
    main()
