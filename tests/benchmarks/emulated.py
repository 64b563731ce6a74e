"""Measures how much throughput the queue, the bucket and a worker's threads cost, without a GPU.

    python -m tests.benchmarks.emulated --steps 1 --jobs 1200
    python -m tests.benchmarks.emulated --steps 1 --jobs 400 --turns 5     # what traces cost
    python -m tests.benchmarks.emulated --steps 30 --alone 200    # one job after the other

Valkey, the S3 server and the worker process are real. The GPU is emulated (`tests.benchmarks.emulated_gpu`):
steps and decode calls take as long as on an H200. The result is compared with the engine alone on the same
emulated GPU, without queue and bucket. Torch's Python code, which competes with all other threads, runs;
CUDA launches do not.

With `--alone` each job is submitted when the one before is done, to an idle worker. What it takes from the
call of `submit_job` until its result is there, less the emulated GPU's time and encoding, is the system's
share: two messages, a claim, three requests to the bucket, the upload, and the threads of producer and
worker. A photo of `--side` pixels a side with grain is encoded and uploaded; encoding is measured by itself,
job by job.

With `--turns` workers without and with traces take turns, and the medians of both are printed. A collector in
a process of its own takes the spans and throws them away.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil

from deploy.embedded.stack import Stack
from producer import submit_job
from tests.benchmarks.emulated_gpu import DECODE_MS, STEP_MS, EmulatedRunner, cost_s
from tests.benchmarks.system import run
from tests.faults.harness import FaultWorker
from worker.bench.saturation import saturate

#: Seconds for which the engine alone is measured.
ENGINE_S = 8.0
#: The first jobs of `--alone` open connections.
UNCOUNTED = 10


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
@click.option("--turns", default=0, help="Turns without and with traces; 0: one without.")
@click.option("--alone", default=0, help="Jobs that are submitted one after the other, instead of --jobs.")
@click.option("--side", default=1024, show_default=True, help="Pixels a side of the pictures of --alone.")
def main(jobs: int, steps: int, rows: int, encode_ms: float, turns: int, alone: int, side: int) -> None:
    if alone:
        print(json.dumps(one_by_one(alone, steps, side)))
        return
    costs = {"ROWS": rows, "STEPS": steps, "ENCODE_MS": encode_ms}
    engine_s = saturate(EmulatedRunner(rows, steps), ENGINE_S, steps=steps, guidance_scale=1.0)["images_s"]
    with Stack(workers=0) as stack:
        emulated = {f"EMULATED_{name}": str(value) for name, value in costs.items()}
        environment = {**stack.environment, **emulated}
        os.environ.update(stack.environment)
        seeds = itertools.count(0, jobs)

        def measure(more: dict[str, str]) -> dict[str, float]:
            worker = EmulatedWorker(stack.home, "worker1", {**environment, **more})
            worker.start()
            seed = next(seeds)
            submit_job("a small cat", seed=10**9 + seed, steps=steps, guidance_scale=1.0).result(timeout=60)
            process = psutil.Process(worker.pid)
            before = process.cpu_times()
            try:
                measured = run(jobs, seed, steps=steps, guidance_scale=1.0)
                spent = process.cpu_times()
                cpu_s = spent.user + spent.system - before.user - before.system
                return {**measured, "worker_cpu_ms_a_job": 1e3 * cpu_s / jobs}
            finally:
                worker.stop()

        if turns:
            compare(measure, turns)
            return
        measured = measure({})
    share = measured["images_s"] / engine_s
    print(json.dumps({"steps": steps, **measured, "engine_images_s": engine_s, "of_the_engine": share}))


def one_by_one(count: int, steps: int, side: int) -> dict[str, Any]:
    """The milliseconds of jobs on an idle worker, without those of the GPU and of encoding, and these."""
    with Stack(workers=0) as stack, tempfile.NamedTemporaryFile() as file:
        encoded = Path(file.name)
        emulated = {"ROWS": 16, "STEPS": steps, "ENCODE_MS": 0, "SIDE": side, "ENCODED": encoded}
        more = {f"EMULATED_{name}": str(value) for name, value in emulated.items()}
        os.environ.update(stack.environment)
        worker = EmulatedWorker(stack.home, "worker1", {**stack.environment, **more})
        worker.start()
        gpu_ms = 1e3 * (steps * cost_s(STEP_MS, 1) + cost_s(DECODE_MS, 1))
        took_ms = []
        try:
            for seed in range(count + UNCOUNTED):
                began_s = time.perf_counter()
                submit_job("a small cat", seed=seed, steps=steps, guidance_scale=1.0).result(timeout=60)
                took_ms.append(1e3 * (time.perf_counter() - began_s))
        finally:
            worker.stop()
        # One after the other: in the order of the jobs.
        encode_ms = [1e3 * float(line) for line in encoded.read_text().split()]
    pairs = list(zip(took_ms, encode_ms, strict=True))[UNCOUNTED:]
    return {
        "jobs": count,
        "gpu_ms": gpu_ms,
        "system_ms": quantiles([took - encoding - gpu_ms for took, encoding in pairs]),
        "encode_ms": quantiles([encoding for _, encoding in pairs]),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """The median and the shares of the tail."""
    ordered = sorted(values)
    return {f"p{share}": ordered[len(ordered) * share // 100] for share in (50, 90, 95, 99)}


def compare(measure: Callable[[dict[str, str]], dict[str, float]], turns: int) -> None:
    """Measure without and with traces in turns, and print the medians."""
    found: dict[str, list[dict[str, float]]] = {"without": [], "with traces": []}
    collector = subprocess.Popen([sys.executable, "-m", "tests.otlp"], stdout=subprocess.PIPE, text=True)
    assert collector.stdout is not None
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.stdout.readline().strip()}
    try:
        for turn in range(turns):
            # Who goes first changes: the machine may get busier or hotter.
            for name in sorted(found, reverse=bool(turn % 2)):
                measured = measure(traced if name == "with traces" else {})
                # Of the whole run: on a busy machine jobs may be submitted more slowly than they are done.
                found[name].append({"jobs_s": measured["jobs"] / measured["whole_run_s"], **measured})
                print(json.dumps({"turn": turn, "name": name, **found[name][-1]}), flush=True)
    finally:
        collector.kill()
        collector.wait()
    for what in ("jobs_s", "worker_cpu_ms_a_job"):
        medians = {name: statistics.median(each[what] for each in runs) for name, runs in found.items()}
        print(json.dumps({"what": what, **medians, "ratio": medians["with traces"] / medians["without"]}))


if __name__ == "__main__":
    main()
