"""LoRAs on a real GPU: compiled steps by the kernels against uncompiled ones, one job after the other."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.benchmarks.mates import psnr
from tests.lora_sets import random_set
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.loras import operators
from worker.device.model_runner import ModelRunner

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

#: Least PSNR in decibels of a picture by one way against the same one by another, in fp16.
TOLERANCE_DB = 40.0


def a_runner(cache: Path, **settings: Any) -> ModelRunner:
    return ModelRunner(WorkerSettings(cache_dir=str(cache), **settings))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """The bundled model."""
    runner = a_runner(tmp_path_factory.mktemp("cache"))
    job = Job(prompt="a small cat", seed=1)
    assert runner.compile(job)
    assert runner.compile(job, loras=True)
    return runner


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return a_runner(tmp_path_factory.mktemp("cache"), compile=False)


#: Ranks of jobs, 0 for one without.
RANKS = (4, 0, 32, 16, 0, 128, 1, 64)


def states_of(runner: ModelRunner, ranks: Any = RANKS, *, wide: bool = False) -> list[Any]:
    states = []
    for number, rank in enumerate(ranks):
        guidance = 1.0 if number % 3 == 2 else 6.0
        state = runner.prepare(Job(prompt="a small cat", seed=number, steps=12, guidance_scale=guidance))
        if rank:
            made = random_set(
                runner._family.adaptable(), number, rank, wide=wide, dora=number == 3, share=0.3
            )
            state.loras = made
        states.append(state)
    return states


def finish(runner: ModelRunner, states: list[Any]) -> list[Any]:
    while running := [state for state in states if state.step < state.steps]:
        assert runner.step(running) == [None] * len(running)
    return [picture.pixels for picture in runner.decode(states)]


def by_loop(runner: ModelRunner, states: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    with monkeypatch.context() as patch:
        patch.setattr(runner._family._lora_unet, "_has_kernels", False)
        return finish(runner, states)


def test_kernels_are_there() -> None:
    assert operators.are_there("cuda")


@pytest.mark.parametrize("wide", [False, True])
def test_uncompiled_kernels_give_the_pictures_of_the_loop(
    plain: ModelRunner, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_loop(plain, states_of(plain, wide=wide), monkeypatch)
    without = finish(plain, states_of(plain, [0] * len(RANKS)))
    for rank, one, other, own in zip(
        RANKS, finish(plain, states_of(plain, wide=wide)), expected, without, strict=True
    ):
        assert psnr(one, other) >= TOLERANCE_DB
        if rank:
            assert psnr(one, own) < TOLERANCE_DB, "the LoRA changes nothing"


def test_compiled_steps_give_the_pictures_of_the_loop_and_nothing_is_compiled_again(
    compiled: ModelRunner, plain: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = counters["stats"]["unique_graphs"]
    expected = by_loop(plain, states_of(plain), monkeypatch)
    for one, other in zip(finish(compiled, states_of(compiled)), expected, strict=True):
        assert psnr(one, other) >= TOLERANCE_DB
    # Others, of which one has another room for ranks, in fewer rows.
    ranks = (200, 8, 0)
    expected = by_loop(plain, states_of(plain, ranks), monkeypatch)
    for one, other in zip(finish(compiled, states_of(compiled, ranks)), expected, strict=True):
        assert psnr(one, other) >= TOLERANCE_DB
    assert counters["stats"]["unique_graphs"] == before


def test_no_graph_reads_factors_that_are_gone(compiled: ModelRunner) -> None:
    first = finish(compiled, states_of(compiled))
    for count in (7, 3, 1):
        gc.collect()
        torch.cuda.empty_cache()
        pictures = finish(compiled, states_of(compiled, RANKS[:count]))
        for one, other in zip(pictures, first, strict=False):
            assert psnr(one, other) >= TOLERANCE_DB
    torch.cuda.synchronize()


def test_jobs_without_loras_run_the_step_that_they_ran_before(compiled: ModelRunner) -> None:
    none = [0] * len(RANKS)
    first = finish(compiled, states_of(compiled, none))
    finish(compiled, states_of(compiled))
    again = finish(compiled, states_of(compiled, none))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


def test_another_process_compiles_steps_with_loras_and_their_convolutions(
    plain: ModelRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a worker, whose process that compiles loads no LoRA."""
    runner = a_runner(tmp_path)
    runner.warm_up()
    ends_s = time.monotonic() + 300
    while not (runner.is_compiled or time.monotonic() > ends_s):
        states = states_of(runner, wide=True)
        assert runner.step(states) == [None] * len(states)
    assert runner.is_compiled
    expected = by_loop(plain, states_of(plain, wide=True), monkeypatch)
    for one, other in zip(finish(runner, states_of(runner, wide=True)), expected, strict=True):
        assert psnr(one, other) >= TOLERANCE_DB
