"""What jobs may ask for, on a real GPU: in mixed batches, compiled, beside the plain worker's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch._dynamo.utils import counters

from tests.benchmarks.mates import psnr
from worker.contract.choices import NoiseSchedule, PromptSyntax, Scheduler
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

#: Least PSNR in decibels of a picture of a compiled batch beside that of the plain worker.
TOLERANCE_DB = 40.0
#: One of each: guidance that is rescaled, prompts that change, are composed and weighted, long ones, others.
KINDS: Sequence[dict[str, Any]] = (
    {},
    {"guidance_rescale": 0.7},
    {"prompt": "a (small:1.3) [cat:dog:0.4]", "prompt_syntax": PromptSyntax.A1111},
    {"prompt": "a cat AND a red apple :0.6", "prompt_syntax": PromptSyntax.A1111},
    {"prompt": "a cat, " * 30, "prompt_syntax": PromptSyntax.A1111},
    {"clip_skip": 2},
    {"guidance_start": 0.2, "guidance_stop": 0.7},
    {"scheduler": Scheduler.DDIM, "eta": 0.5},
    {"scheduler": Scheduler.EULER, "schedule": NoiseSchedule.KARRAS},
)


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, ModelRunner]:
    """The bundled model, compiled and plain."""
    cache = str(tmp_path_factory.mktemp("cache"))
    both = tuple(
        ModelRunner(WorkerSettings(cache_dir=cache, compile=asked, compile_first=True))
        for asked in (True, False)
    )
    for runner in both:
        runner.warm_up()
    return both[0], both[1]


def finish(runner: ModelRunner, jobs: Sequence[Job]) -> list[Any]:
    """The pixels of jobs that start together."""
    states = [runner.prepare(job) for job in jobs]
    while running := [state for state in states if state.step < state.steps]:
        assert runner.step(running) == [None] * len(running)
    return [picture.pixels for picture in runner.decode(states)]


def test_every_scheduler_in_one_compiled_batch(runners: tuple[ModelRunner, ModelRunner]) -> None:
    compiled, plain = runners
    jobs = [
        Job(prompt="a small cat", seed=seed, steps=12, scheduler=scheduler)
        for seed, scheduler in enumerate(Scheduler)
    ]
    found = zip(jobs, finish(compiled, jobs), finish(plain, jobs), strict=True)
    values = {job.scheduler: psnr(one, other) for job, one, other in found}
    assert min(values.values()) >= TOLERANCE_DB, values


def test_every_kind_of_job_in_one_compiled_batch(runners: tuple[ModelRunner, ModelRunner]) -> None:
    compiled, plain = runners
    jobs = [
        Job.model_validate({"prompt": "a small cat", "seed": seed, "steps": 12, **kind})
        for seed, kind in enumerate(KINDS)
    ]
    for job in jobs:
        assert compiled.compile(job), job
    before = counters["stats"]["unique_graphs"]
    for index, job in enumerate(jobs):
        value = psnr(finish(compiled, [job, job])[0], finish(plain, [job])[0])
        assert value >= TOLERANCE_DB, (KINDS[index], value)
    assert counters["stats"]["unique_graphs"] == before
    found = zip(KINDS, finish(compiled, jobs), finish(plain, jobs), strict=True)
    values = {str(kind): psnr(one, other) for kind, one, other in found}
    assert min(values.values()) >= TOLERANCE_DB, values
