"""Measures how much throughput the queue, the bucket and a worker's threads cost, without a GPU.

    python -m tests.benchmarks.emulated --steps 1 --jobs 1200

Valkey, the S3 server and the worker process are real. The GPU is emulated (`tests.benchmarks.emulated_gpu`):
steps and decode calls take as long as on an H200. The result is compared with the engine alone on the same
emulated GPU, without queue and bucket. Torch's Python code, which competes with all other threads, runs;
CUDA launches do not.
"""

from __future__ import annotations

import json
import os

import click

from deploy.embedded.stack import Stack
from producer import submit_job
from tests.benchmarks.emulated_gpu import EmulatedRunner
from tests.benchmarks.engine import saturate
from tests.benchmarks.system import run
from tests.faults.harness import FaultWorker

#: Seconds for which the engine alone is measured.
ENGINE_S = 8.0


class EmulatedWorker(FaultWorker):
    """A worker whose GPU is emulated."""

    app = "tests.benchmarks.emulated_app"


@click.command(help=__doc__)
@click.option("--jobs", default=1200, show_default=True, help="Jobs that are submitted.")
@click.option("--steps", default=1, show_default=True, help="Steps of a job, which has no guidance.")
@click.option("--rows", default=16, show_default=True, help="Rows in a step, at most.")
@click.option(
    "--encode-ms",
    default=120.0,
    show_default=True,
    help="Milliseconds to encode a picture, without using a core.",
)
def main(jobs: int, steps: int, rows: int, encode_ms: float) -> None:
    costs = {"ROWS": rows, "STEPS": steps, "ENCODE_MS": encode_ms}
    engine_s = saturate(EmulatedRunner(rows, steps), ENGINE_S, steps=steps, guidance_scale=1.0)["images_s"]
    with Stack(workers=0) as stack:
        emulated = {f"EMULATED_{name}": str(value) for name, value in costs.items()}
        EmulatedWorker(stack.home, "worker1", {**stack.environment, **emulated}).start()
        os.environ.update(stack.environment)
        submit_job("a small cat", seed=10**9, steps=steps, guidance_scale=1.0).result(timeout=60)
        measured = run(jobs, steps=steps, guidance_scale=1.0)
    share = measured["images_s"] / engine_s
    print(json.dumps({"steps": steps, **measured, "engine_images_s": engine_s, "of_the_engine": share}))


if __name__ == "__main__":
    main()
