"""Jobs with the bundled LoRAs, in mixed batches, beside diffusers' own pipeline, one job after the other.

    python -m tests.benchmarks.lora_mates --jobs 200

A job has none, one or several of them, of weights of its own. diffusers computes in fp32, by
`load_lora_weights`, `set_adapters`, and a generator of the job's seed. In fp16 its own pipeline is far from
that (27 dB), because it keeps latents in fp16.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import click
import diffusers
import numpy as np
import torch

from tests.benchmarks.mates import pictures, psnr
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.settings import worker_settings
from worker.device.model_runner import ModelRunner
from worker.engine.engine import Engine
from worker.model.beside.file_store import FileStore

BUNDLED = Path(__file__).parents[2] / "worker/demo"
LORAS = ("pixel", "sketch", "neon")
SUBJECTS = ("cat", "dog", "house", "tree", "car", "fish")


def jobs_of(count: int, rng: random.Random) -> list[Job]:
    """Jobs that share a lane."""
    jobs = []
    for seed in range(count):
        chosen = rng.sample(LORAS, rng.choice([0, 1, 1, 1, 2, 3]))
        fields = {
            "prompt": f"a {rng.choice(SUBJECTS)}",
            "seed": seed,
            "steps": rng.choice([8, 12, 20]),
            "guidance_scale": rng.choice([1.0, 2.0, 3.0]),
            "scheduler": "euler",
            "loras": [{"name": name, "weight": rng.choice([-0.5, 0.4, 0.8, 1.0])} for name in chosen],
        }
        jobs.append(Job.parse(fields))
    return jobs


class Diffusers:
    """Its pipeline with the LoRAs loaded."""

    def __init__(self, device: torch.device) -> None:
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(BUNDLED / "model")
        pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        self._pipeline = pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        for name in LORAS:
            file = f"{name}.safetensors"
            self._pipeline.load_lora_weights(str(BUNDLED / "loras"), weight_name=file, adapter_name=name)

    def draw(self, job: Job) -> np.ndarray:
        if job.loras:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(
                [each.name for each in job.loras], [each.weight for each in job.loras]
            )
        else:
            self._pipeline.disable_lora()
        [image] = self._pipeline(
            job.prompt,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed),
            output_type="np",
        ).images
        return np.asarray((image * 255).round(), np.uint8)


def wait_until_compiled(runner: ModelRunner, files: FileStore) -> None:
    """Until steps with the bundled LoRAs run compiled, which change convolutions, too."""
    job = Job.parse({"prompt": "a small cat", "seed": 0, "loras": LORAS[0]}).resolved(runner.served)
    state, ends_s = runner.prepare(with_files(job, files.index)), time.monotonic() + 200
    while not runner.is_compiled and time.monotonic() < ends_s:
        runner._seconds([state])
        time.sleep(0.1)


@click.command(help=__doc__)
@click.option("--jobs", "count", default=200, show_default=True)
def main(count: int) -> None:
    settings = worker_settings().model_copy(update={"compile_first": True})
    files = FileStore({Kind.LORA: [str(BUNDLED / "loras")]}, settings.cache_folder)
    runner = ModelRunner(settings, files=files)
    runner.warm_up()
    if runner._graphs is not None:
        wait_until_compiled(runner, files)
    engine = Engine(runner, job_timeout_s=600, on_failure=lambda error: print(repr(error)))
    engine.start()
    jobs = [with_files(job.resolved(runner.served), files.index) for job in jobs_of(count, random.Random(1))]
    together = pictures(engine, jobs, 2 * runner.max_rows, "together")
    engine.stop()
    peer = Diffusers(runner._device)
    found = [psnr(one, peer.draw(job)) for one, job in zip(together, jobs, strict=True)]
    worst = sorted(range(count), key=found.__getitem__)[:3]
    result = {
        "name": "lora mates",
        "jobs": count,
        "with LoRAs": sum(bool(job.loras) for job in jobs),
        "least_db": found[worst[0]],
        "median_db": sorted(found)[count // 2],
        "below_40_db": sum(value < 40 for value in found),
        "worst": [f"{found[index]:.1f} dB: {jobs[index].prompt}, {jobs[index].loras}" for index in worst],
        "compiled": runner.is_compiled,
        "device": str(runner._device),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
