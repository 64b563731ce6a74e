"""Jobs for `tests.toy_flow`: rendered by the real engine in mixed batches, and one by one by a plain loop."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray

from tests.toy_flow import CHANNELS, TEXT_TOKENS, ToyFlow, loaded_toy
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered

#: Two sizes have as many tokens as each other, and are different lanes all the same.
SIZES = ((64, 64), (96, 64), (64, 96))
#: Of all kinds: no two that follow each other have the same size, steps or guidance.
JOBS = [
    Job(
        prompt=f"a small cat, number {number}",
        negative_prompt="dogs" if number % 4 == 0 else "",
        seed=number,
        width=width,
        height=height,
        steps=3 + number % 5,
        guidance_scale=(4.0, 1.0, 2.5, 0.0)[number % 4],
        guidance_stop=0.5 if number % 8 == 2 else 1.0,
        scheduler=("default", "euler")[number % 2],
    )
    for number, (width, height) in enumerate(SIZES * 6)
]
#: Jobs that are there when the engine starts. The others join one by one, one after each step.
FIRST = 6


def plain_picture(toy: ToyFlow, job: Job) -> NDArray[np.uint8]:
    """The pixels of `job` by a loop for this job alone. It shares no code with the worker or the family."""
    assert job.width and job.height and job.guidance_scale is not None  # noqa: PT018
    device = toy.vae.device
    height, width = job.height // 8, job.width // 8
    noise = torch.randn(1, CHANNELS, height, width, generator=torch.Generator().manual_seed(job.seed))
    # (1, height, width, channels, 2, 2) of 2 x 2 patches, as Flux packs them.
    patches = noise.view(1, CHANNELS, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    latents = patches.reshape(1, height * width // 4, CHANNELS * 4).to(device)
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    grid = [[row / (height / 2 - 1), column / (width / 2 - 1)] for row in rows for column in columns]
    positions = torch.tensor([grid], dtype=torch.float32, device=device)

    def predict(text: str, time: torch.Tensor) -> torch.Tensor:
        ids = toy.tokenizer(text, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
        sequence = toy.sequence_encoder(ids.input_ids.to(device)).last_hidden_state
        pooled = toy.pooled_encoder(ids.input_ids.to(device)).pooler_output
        return toy.transformer(latents, time[None].to(device) / 1000, sequence, pooled, positions)

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(job.steps, mu=height * width / 4 / 32)
    with torch.no_grad():
        for step, time in enumerate(scheduler.timesteps):
            velocity = predict(job.prompt, time)
            if (
                job.guidance_scale > 1
                and job.guidance_start <= step / len(scheduler.timesteps) < job.guidance_stop
            ):
                negative = predict(job.negative_prompt, time)
                velocity = negative + job.guidance_scale * (velocity - negative)
            latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
        patches = latents.view(1, height // 2, width // 2, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
        whole = patches.reshape(1, CHANNELS, height, width)
        image = toy.vae.decode(whole / toy.vae.config.scaling_factor).sample[0]
    pixels = ((image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255).round()
    return pixels.cpu().numpy().astype(np.uint8)


class Entry(NamedTuple):
    """A job in a step."""

    size: tuple[int | None, int | None]
    steps: int
    #: Steps done before.
    done: int
    rows: int


class RecordingRunner(ModelRunner):
    """A runner with the toy that keeps, for each step, what was in its batch."""

    def __init__(self, settings: WorkerSettings, device: torch.device) -> None:
        self.batches: list[list[Entry]] = []
        super().__init__(settings, loaded_toy(device), ToyFlow(device))

    def step(self, states: Sequence[JobState]) -> list[Any]:
        self.batches.append(
            [
                Entry((state.job.width, state.job.height), state.steps, state.step, state.rows)
                for state in states
            ]
        )
        return super().step(states)


def render(runner: ModelRunner) -> list[NDArray[np.uint8]]:
    """The pixels of `JOBS` by the real engine, which the jobs join while others are in flight."""
    waiting, futures = list(enumerate(JOBS)), dict[int, Future[Rendered]]()
    all_in = threading.Event()

    def submit() -> None:
        if not waiting:
            all_in.set()
            return
        number, job = waiting.pop(0)
        futures[number] = engine.submit(str(number), job)

    def on_step(rows: int, seconds: float) -> None:
        submit()

    engine = Engine(runner, job_timeout_s=300, on_failure=lambda error: all_in.set(), on_step=on_step)
    for _ in range(FIRST):
        submit()
    engine.start()
    try:
        assert all_in.wait(300)
        return [futures[number].result(300).picture.pixels for number in range(len(JOBS))]
    finally:
        engine.stop()


def check(runner: RecordingRunner, pictures: Sequence[NDArray[np.uint8]], toy: ToyFlow) -> None:
    """`pictures` are those of the plain loop within 1 of 255, differ, and were rendered in mixed batches."""
    for job, picture in zip(JOBS, pictures, strict=True):
        expected = plain_picture(toy, job)
        assert picture.shape == expected.shape == (job.height, job.width, 3)
        difference = np.abs(picture.astype(int) - expected.astype(int)).max()
        assert difference <= 1, f"{job!r} is off by {difference}"
        assert picture.std() > 10
    assert len({picture.tobytes() for picture in pictures}) == len(JOBS)
    mixed = set()
    for batch in runner.batches:
        sizes, *others = (set(values) for values in zip(*batch, strict=True))
        assert len(sizes) == 1
        # Jobs of other numbers of steps, at other steps, and with guidance and without.
        if all(len(values) > 1 for values in others):
            mixed |= sizes
    assert mixed == set(SIZES)
