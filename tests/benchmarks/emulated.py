"""What queue, storage and the worker's threads cost a GPU, on a machine that has none.

    python -m tests.benchmarks.emulated --steps 1 --jobs 1200

Real Valkey, S3 server and worker process; the GPU is a pretended device (`tests.benchmarks.emulated_app`)
that steps and decodings keep busy for as long as they would an H200, small batches more for each row than
large ones. The engine alone on such a device, without queue and bucket, is what there is to reach. Torch's
own Python, which competes with all other threads, is there; CUDA's launches are not.
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

#: Seconds that the engine alone is measured for.
ENGINE_S = 8.0


class EmulatedWorker(FaultWorker):
    """The GPU of this one is emulated."""

    app = "tests.benchmarks.emulated_app"


@click.command(help=__doc__)
@click.option("--jobs", default=1200, show_default=True)
@click.option("--steps", default=1, show_default=True, help="Of a job, which takes one row.")
@click.option("--rows", default=16, show_default=True, help="Of a step, at most.")
@click.option("--encode-ms", default=120.0, show_default=True, help="Of a picture, without a core.")
def main(jobs: int, steps: int, rows: int, encode_ms: float) -> None:
    costs = {"ROWS": rows, "STEPS": steps, "ENCODE_MS": encode_ms}
    engine_s = saturate(EmulatedRunner(rows, steps), ENGINE_S, steps=steps, guidance_scale=1.0)["images_s"]
    with Stack(workers=0) as stack:
        emulated = {f"EMULATED_{name}": str(value) for name, value in costs.items()}
        EmulatedWorker(stack.home, "worker1", {**stack.environment, **emulated}).start()
        os.environ.update(stack.environment)
        submit_job("a small cat", seed=10**9, steps=steps, guidance_scale=1.0).result(timeout=60)
        told = run(jobs, steps=steps, guidance_scale=1.0)
    share = told["images_s"] / engine_s
    print(json.dumps({"steps": steps, **told, "engine_images_s": engine_s, "of_the_engine": share}))


if __name__ == "__main__":
    main()
