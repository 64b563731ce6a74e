"""Jobs with a second pass in an engine on a real GPU, beside the plain worker's pictures; and tiles."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.benchmarks.mates import psnr
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner
from worker.engine.engine import Engine
from worker.engine.runner import FirstPass

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

#: Least PSNR in decibels of a picture of a compiled batch beside that of the plain worker, and of tiles.
TOLERANCE_DB = 40.0
#: In three lanes: 128 px, 256 px, and 192 px.
JOBS = [
    Job(prompt="a small cat", seed=1, steps=12, upscale=2, upscale_strength=0.6),
    Job(prompt="a small cat", seed=2, steps=20, upscale=2, upscale_strength=0.6, upscaler="lanczos"),
    Job(prompt="two dogs", seed=3, steps=12, upscale=1.5, scheduler="euler_ancestral"),
    Job(prompt="a rocket", seed=4, steps=30),
    Job(prompt="a rocket", seed=5, steps=30, width=256, height=256),
]


def alone(runner: ModelRunner, job: Job) -> Any:
    """The pixels of a job that nothing runs beside."""
    given: FirstPass | None = None
    while True:
        state = runner.prepare(job, given)
        while state.step < state.steps:
            assert runner.step([state]) == [None]
        [outcome] = runner.decode([state])
        if not isinstance(outcome, FirstPass):
            return outcome
        given = outcome


def test_they_share_steps_in_all_lanes_and_are_the_same(tmp_path: Any) -> None:
    compiled, plain = (
        ModelRunner(WorkerSettings(cache_dir=str(tmp_path), compile=asked, compile_first=True))
        for asked in (True, False)
    )
    compiled.warm_up()
    failed = threading.Event()
    engine: Engine[Any] = Engine(compiled, job_timeout_s=300, on_failure=lambda error: failed.set())
    jobs = [job.resolved(compiled.served) for job in JOBS for _ in range(3)]
    futures = [engine.submit(f"{number}", job) for number, job in enumerate(jobs)]
    engine.start()
    try:
        found = [future.result(300).picture.pixels for future in futures]
    finally:
        engine.stop()
    assert not failed.is_set()
    expected = {job.seed: alone(plain, job).pixels for job in JOBS}
    values = [psnr(one, expected[job.seed]) for one, job in zip(found, jobs, strict=True)]
    assert min(values) >= TOLERANCE_DB, values


def test_a_picture_in_tiles_is_near_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(WorkerSettings(compile=False))
    job = Job(prompt="a small cat", seed=1, steps=12, width=512, height=512)
    whole = alone(runner, job).pixels

    def out_of_memory(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner._family, "decode", out_of_memory)
    state = runner.prepare(job)
    while state.step < state.steps:
        runner.step([state])
    [tiled] = runner.decode([state], is_alone=True)
    assert tiled.warnings
    assert psnr(tiled.pixels, whole) >= TOLERANCE_DB
