"""The runner on a real GPU: compiled steps, exact mode, memory that runs out."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.benchmarks.mates import jobs_of, psnr
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.cuda_graphs import MAX_ROWS, batch_size
from worker.device.model_runner import ModelRunner
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

#: Least PSNR in decibels of a picture rendered alone against the same one rendered in a batch: what the
#: README promises in fp16.
TOLERANCE_DB = 40.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def compiled(cache: str) -> ModelRunner:
    """The bundled model."""
    runner = ModelRunner(WorkerSettings(cache_dir=cache, compile_first=True))
    assert {choice.what: choice.choice for choice in runner.warm_up()}["compile"] == "yes"
    return runner


@pytest.fixture(scope="module")
def plain(cache: str) -> ModelRunner:
    runner = ModelRunner(WorkerSettings(cache_dir=cache, compile=False))
    runner.warm_up()
    return runner


@pytest.fixture
def engine_of() -> Iterator[Any]:
    engines: list[Engine[Any]] = []

    def start(runner: ModelRunner) -> Engine[Any]:
        engines.append(Engine(runner, job_timeout_s=300, on_failure=lambda error: None))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def finish(runner: ModelRunner, *jobs: Job) -> list[Any]:
    """The pixels of jobs that start together."""
    states = [runner.prepare(job) for job in jobs]
    while running := [state for state in states if state.step < state.steps]:
        assert runner.step(running) == [None] * len(running)
    return [picture.pixels for picture in runner.decode(states)]


def some_jobs(count: int) -> list[Job]:
    return jobs_of(count, random.Random(2))


def test_compiled_steps_give_the_pictures_of_plain_ones(compiled: ModelRunner, plain: ModelRunner) -> None:
    jobs = some_jobs(12)
    for one, other in zip(finish(compiled, *jobs), finish(plain, *jobs), strict=True):
        assert psnr(one, other) >= TOLERANCE_DB


def test_nothing_is_compiled_again_whatever_the_rows(compiled: ModelRunner) -> None:
    before = counters["stats"]["unique_graphs"]
    most = MAX_ROWS + 8
    states = [compiled.prepare(Job(prompt="a cat", seed=seed, steps=150)) for seed in range(most // 2)]
    for count in range(1, len(states) + 1):
        assert compiled.step(states[:count]) == [None] * count
    assert counters["stats"]["unique_graphs"] == before


def test_exact_mode_gives_the_same_bits_alone_and_in_a_batch(cache: str, engine_of: Any) -> None:
    runner = ModelRunner(WorkerSettings(cache_dir=cache, exact=True))
    runner.warm_up()
    engine = engine_of(runner)
    jobs = some_jobs(24)
    together = [engine.submit(f"together {index}", job) for index, job in enumerate(jobs)]
    pixels = [future.result(300).picture.pixels for future in together]
    for index, job in enumerate(jobs):
        alone = engine.submit(f"alone {index}", job).result(300).picture.pixels
        assert np.array_equal(alone, pixels[index])


def test_another_size_is_served_while_it_compiles(compiled: ModelRunner, engine_of: Any) -> None:
    engine = engine_of(compiled)
    job = Job(prompt="a small cat", seed=1, steps=20, width=96, height=96)
    first = engine.submit("first", job).result(300).picture.pixels
    assert compiled.compile(job)
    assert psnr(first, engine.submit("again", job).result(300).picture.pixels) >= TOLERANCE_DB


@pytest.fixture
def little_memory() -> Iterator[Any]:
    """Leave this process no more of the GPU's memory than it has, and a little."""

    def limit(free_bytes: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free_bytes) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
def test_a_batch_that_does_not_fit_goes_on_in_halves(
    cache: str, engine_of: Any, little_memory: Any, is_compiled: bool
) -> None:
    """Real out-of-memory: no step is lost, the cap is lowered, and the pictures are the same."""
    runner = ModelRunner(
        WorkerSettings(cache_dir=cache, compile=is_compiled, attention="naive", max_batch=32)
    )
    # Naive attention at this size takes more than all else, decoding included.
    jobs = [Job(prompt="a small cat", seed=seed, steps=6, width=1024, height=1024) for seed in range(16)]
    expected = [finish(runner, job)[0] for job in jobs]
    if is_compiled:
        assert runner.compile(jobs[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.step([runner.prepare(jobs[0])])
    torch.cuda.synchronize()
    of_one = torch.cuda.max_memory_allocated() - before
    little_memory(5 * of_one)
    engine = engine_of(runner)
    futures: list[Future[Rendered]] = [engine.submit(str(job.seed), job) for job in jobs]
    for future, pixels in zip(futures, expected, strict=True):
        assert psnr(future.result(300).picture.pixels, pixels) >= TOLERANCE_DB
    assert engine._batcher.cap((16, 128, 128)) < 32


def test_a_job_too_large_for_the_memory_fails_alone(
    plain: ModelRunner, engine_of: Any, little_memory: Any
) -> None:
    little_memory(200 * 2**20)
    engine = engine_of(plain)
    small = [engine.submit(str(seed), Job(prompt="a dog", seed=seed, steps=8)) for seed in range(4)]
    large = engine.submit("large", Job(prompt="a dog", seed=1, steps=2, width=2048, height=2048))
    assert "does not fit" in str(large.exception(300))
    assert all(future.result(300).picture.pixels.any() for future in small)


def test_memory_is_reported_for_each_batch_size(compiled: ModelRunner) -> None:
    finish(compiled, Job(prompt="a small cat", seed=1, steps=2))
    reported = compiled.memory()
    assert reported["in use"] <= reported["held"]
    assert reported[f"{batch_size(2)} rows of 2 jobs with 32 tokens, 16x16x16"] > 0


def test_the_kernels_are_kept_on_disk(compiled: ModelRunner, cache: str) -> None:
    # The first of a process' runners chooses the folder.
    assert any(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*"))
