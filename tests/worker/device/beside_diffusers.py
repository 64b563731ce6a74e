"""A tiny model behind a runner that offers files, with diffusers' own pipeline of it beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner
from worker.engine.runner import Picture
from worker.model.beside.file_store import FileStore


def assert_drawn(picture: object, expected: Any, job: Job) -> None:
    """`picture` is what diffusers gives for `job`, within 1 of 255, and is not blank."""
    assert isinstance(picture, Picture), picture
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.shape == expected.shape
    difference = np.abs(picture.pixels.astype(int) - expected.astype(int))
    assert difference.max() <= 1, f"{job!r} is off by {difference.max()}"
    assert picture.pixels.std() > 10


class BesideDiffusers:
    """The model in `path`: what the runner draws of a job, and what diffusers does."""

    def __init__(self, path: Path, files: FileStore) -> None:
        self.files = files
        self.runner = ModelRunner(WorkerSettings(model=str(path)), files=files)
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(path)
        self.pipeline.set_progress_bar_config(disable=True)

    def job_of(self, **fields: Any) -> Job:
        """A resolved job, of seed 7 and 3 steps unless `fields` say."""
        job = Job(**{"seed": 7, "steps": 3, **fields})
        return with_files(job.resolved(self.runner.served), self.files.index)

    def expected(self, job: Job) -> Any:
        """Its pixels by diffusers' pipeline, 64 x 64; by one for inpainting with all of an image masked."""
        masked = {"image": Image.new("RGB", (64, 64)), "mask_image": Image.new("L", (64, 64), 255)}
        image = self.pipeline(
            job.prompt,
            negative_prompt=job.negative_prompt or None,
            width=64,
            height=64,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed),
            **(masked if "Inpaint" in type(self.pipeline).__name__ else {}),
        ).images[0]
        return np.asarray(image)

    def together(self, jobs: list[Job]) -> list[Any]:
        """The runner's pictures of jobs that share their steps."""
        states = [self.runner.prepare(job) for job in jobs]
        while left := [state for state in states if state.step < state.steps]:
            assert self.runner.step(left) == [None] * len(left)
        return list(self.runner.decode(states))
