"""What queue, storage and the worker's threads cost a GPU, on a machine that has none.

    python -m tests.benchmarks.emulated --steps 1 --jobs 1200

Real Valkey, S3 server and worker process; the GPU is a lock that is held for as long as steps and decodings
would take it (`tests.benchmarks.emulated_app`), so what is lost is lost by what is real. What is not seen is
what torch's own Python costs beside the other threads.
"""

from __future__ import annotations

import json
import os

import click

from deploy.stack import Stack
from producer import submit_job
from tests.benchmarks.system import run
from tests.faults.harness import FaultWorker


class EmulatedWorker(FaultWorker):
    """The GPU of this one is a lock."""

    app = "tests.benchmarks.emulated_app"


@click.command(help=__doc__)
@click.option("--jobs", default=1200, show_default=True)
@click.option("--steps", default=1, show_default=True, help="Of a job, which takes one row.")
@click.option("--rows", default=16, show_default=True, help="Of a step, at most.")
@click.option("--row-ms", default=2.2, show_default=True, help="Of a step: as on an H100 with SD 1.x shapes.")
@click.option("--decode-ms", default=9.3, show_default=True, help="Of a picture.")
@click.option("--encode-ms", default=120.0, show_default=True, help="Of a picture, without a core.")
def main(jobs: int, steps: int, rows: int, row_ms: float, decode_ms: float, encode_ms: float) -> None:
    costs = {"ROWS": rows, "ROW_MS": row_ms, "DECODE_MS": decode_ms, "ENCODE_MS": encode_ms}
    with Stack(workers=0) as stack:
        emulated = {f"EMULATED_{name}": str(value) for name, value in costs.items()}
        EmulatedWorker(stack.home, "worker1", {**stack.environment, **emulated}).start()
        os.environ.update(stack.environment)
        submit_job("a small cat", seed=10**9, steps=steps, guidance_scale=1.0).result(timeout=60)
        told = run(jobs, steps=steps, guidance_scale=1.0)
    possible = 1e3 / (steps * row_ms + decode_ms)
    print(json.dumps({"steps": steps, **told, "possible_s": possible, "share": told["images_s"] / possible}))


if __name__ == "__main__":
    main()
