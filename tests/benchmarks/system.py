"""The whole system at saturation: pictures a second from the queue to the bucket.

    python -m deploy.local -- python -m tests.benchmarks.system --jobs 200 --steps 50

Runs inside a stack: its environment says where queue and bucket are, and a worker must be up. All jobs are
submitted at once; counted is the middle of the run, from the first quarter's last picture to the last tenth's
first, so that neither filling nor emptying counts. Pictures come in groups, so their rate is the slope of the
line through all of them, not what lies between two. A picture counts when its record says that it lies in
the bucket. `tests.benchmarks.engine` with the same options is what there is to reach.
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

#: Shares of the run before and after what is counted.
FILLING, EMPTYING = 0.25, 0.1


def run(jobs: int, seed: int = 0, **fields: Any) -> dict[str, float]:
    """Submit `jobs` jobs of these `fields`, from `seed` on, and wait for all of them; what came of it."""
    begun_s = time.perf_counter()
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
    counted = range(int(jobs * FILLING), int(jobs * (1 - EMPTYING)))
    return {
        "jobs": jobs,
        "images_s": statistics.linear_regression([finished[place] for place in counted], counted).slope,
        "submit_s": jobs / (submitted_s - begun_s),
        "encode_and_upload_ms_median": 1e3 * uploads[jobs // 2],
        "whole_run_s": finished[-1] - begun_s,
    }


@click.command(help=__doc__)
@click.option("--jobs", default=200, show_default=True)
@click.option("--steps", type=int)
@click.option("--size", type=int, help="Pixels a side; the model's own when not given.")
@click.option("--guidance", "guidance_scale", type=float)
@click.option("--scheduler")
@click.option("--seed", default=0, show_default=True, help="Of the first; the bucket has none of them yet.")
@click.option("--format", "image_format", default="png", show_default=True)
@click.option("--name", default="system", help="What the line is called.")
def main(jobs: int, seed: int, size: int | None, image_format: str, name: str, **fields: Any) -> None:
    fields = {key: value for key, value in fields.items() if value is not None} | {"format": image_format}
    fields |= {"width": size, "height": size} if size else {}
    # The worker's first pictures, of another seed, are not counted.
    submit_job("a small cat", seed=10**9 + seed, **fields).result(timeout=900)
    print(json.dumps({"name": name, **fields, **run(jobs, seed, **fields)}))


if __name__ == "__main__":
    main()
