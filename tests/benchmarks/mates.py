"""Does a picture depend on the other jobs of its batches? Renders jobs alone and together, and compares them.

    python -m tests.benchmarks.mates --jobs 200             PSNR of each picture, alone against in batches
    SMALLCAT_EXACT=1 python -m tests.benchmarks.mates       all must be equal to the bit

Jobs differ in steps, guidance and scheduler, and each joins while others are in flight.
"""

from __future__ import annotations

import json
import math
import random
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import click
import numpy as np
import torch

from worker.contract.choices import Scheduler
from worker.contract.job import Job
from worker.contract.settings import worker_settings
from worker.demo.training import evaluate
from worker.device.model_runner import ModelRunner
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered

#: With guidance the bundled model draws noise by it (worker/demo/README.md), whose PSNR says nothing.
WITHOUT_GUIDANCE = (Scheduler.PNDM,)


def jobs_of(count: int, rng: random.Random) -> list[Job]:
    """Jobs of all kinds that share a lane."""
    prompts = Path(evaluate.CONTACT_SHEET).read_text("utf-8").split("\n")
    lines = [line.partition(" --")[0].strip() for line in prompts if line.strip() and line[0] != "#"]
    jobs = []
    for seed in range(count):
        scheduler = rng.choice(list(Scheduler))
        plain = scheduler in WITHOUT_GUIDANCE or rng.random() < 0.25
        jobs.append(
            Job(
                prompt=rng.choice(lines),
                seed=seed,
                steps=rng.choice([8, 12, 20, 30]),
                guidance_scale=1.0 if plain else rng.choice([2.0, 3.0, 4.0]),
                scheduler=scheduler,
            )
        )
    return jobs


def pictures(engine: Engine, jobs: list[Job], at_once: int, name: str) -> list[np.ndarray]:
    """Each job's pixels, with `at_once` of them in flight at any time."""
    futures: list[Future[Rendered]] = []
    in_flight: set[Future[Rendered]] = set()
    for index, job in enumerate(jobs):
        if len(in_flight) == at_once:
            in_flight = set(wait(in_flight, 600, FIRST_COMPLETED).not_done)
        futures.append(engine.submit(f"{name} {index}", job))
        in_flight.add(futures[-1])
    return [future.result(600).picture.pixels for future in futures]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels; infinity for equal pictures."""
    error = ((one.astype(float) - other.astype(float)) ** 2).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@click.command(help=__doc__)
@click.option("--jobs", "count", default=200, show_default=True)
@click.option("--at-once", default=0, help="Jobs in flight; two for each row of a batch when not given.")
def main(count: int, at_once: int) -> None:
    settings = worker_settings().model_copy(update={"compile_first": True})
    runner = ModelRunner(settings)
    runner.warm_up()
    engine = Engine(runner, job_timeout_s=600, on_failure=lambda error: print(repr(error)))
    engine.start()
    jobs = jobs_of(count, random.Random(1))
    together = pictures(engine, jobs, at_once or 2 * runner.max_rows, "together")
    alone = pictures(engine, jobs, 1, "alone")
    engine.stop()
    by_job = [psnr(one, other) for one, other in zip(together, alone, strict=True)]
    values = sorted(by_job)
    worst = max(
        int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(together, alone, strict=True)
    )
    result = {
        "name": "mates",
        "exact": settings.exact,
        "jobs": count,
        "max_rows": runner.max_rows,
        "least_db": values[0],
        "median_db": values[len(values) // 2],
        "below_40_db": sum(value < 40 for value in values),
        "worst": [
            f"{by_job[index]:.1f} dB: {jobs[index].scheduler}, {jobs[index].steps} steps, "
            f"guidance {jobs[index].guidance_scale:g}, seed {jobs[index].seed}, {jobs[index].prompt}"
            for index in sorted(range(count), key=by_job.__getitem__)[:3]
        ],
        "equal_to_the_bit": sum(math.isinf(value) for value in values),
        "largest_difference": worst,
        "torch": torch.__version__,
        "device": {choice.what: choice.choice for choice in runner.choices}["device"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
