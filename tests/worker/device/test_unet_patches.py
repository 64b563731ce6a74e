"""Rewritten modules against the ones they stand for, in double precision: what differs would be an error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import upsampling

from tests import tiny_models
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device import attention, unet_patches
from worker.device.job_state import batch_of
from worker.device.model_runner import ModelRunner
from worker.device.step import Batch, denoise

attends_first = functools.partial(tiny_models.tiny_sd1, attends_first=True)
MODELS = [
    attends_first,
    tiny_models.tiny_sd1,
    tiny_models.tiny_sd2,
    tiny_models.tiny_sdxl,
    tiny_models.tiny_lcm,
]
Make = Callable[[Path], Path]


def double(runner: ModelRunner) -> Any:
    """The runner's pipeline, in double precision."""
    pipeline = runner._pipeline
    pipeline.unet.double()
    pipeline.vae.double()
    return pipeline


def a_batch(runner: ModelRunner) -> Batch:
    """Jobs with guidance and without, in double precision."""
    jobs = [
        Job(prompt=f"cat {seed}", seed=seed, guidance_scale=scale) for seed, scale in enumerate((7, 1, 3))
    ]
    batch = batch_of([runner.prepare(job) for job in jobs])
    conditions = {name: tensor.double() for name, tensor in batch.conditions.items()}
    return dataclasses.replace(batch, text=batch.text.double(), conditions=conditions)


@pytest.fixture
def runner_of(tmp_path: Path) -> Callable[[Make], ModelRunner]:
    return lambda make: ModelRunner(WorkerSettings(model=str(make(tmp_path / "model"))))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 4)])
def test_upsampling_by_phases_is_upsampling(height: int, width: int) -> None:
    torch.manual_seed(0)
    original = upsampling.Upsample2D(6, use_conv=True, out_channels=5).double()
    hidden_states = torch.randn(2, 6, height, width, dtype=torch.float64)
    rewritten = unet_patches.Upsample2D(original)
    rewritten.weight.data = unet_patches._phases(original.conv.weight)
    with torch.no_grad():
        assert torch.allclose(rewritten(hidden_states), original(hidden_states), atol=1e-12)
        size = (2 * height - 1, 2 * width - 1)
        assert torch.equal(rewritten(hidden_states, size), original(hidden_states, size))


@pytest.mark.parametrize("make", MODELS)
def test_a_step_is_the_same(make: Make, runner_of: Callable[[Make], ModelRunner]) -> None:
    runner = runner_of(make)
    pipeline = double(runner)
    batch = a_batch(runner)
    with torch.no_grad():
        expected = denoise(pipeline.unet, batch)
        unet_patches.install(pipeline)
        for one, other in zip(denoise(pipeline.unet, batch), expected, strict=True):
            # Weights that were added up are rounded to single precision.
            assert torch.allclose(one.double(), other.double(), atol=1e-5)
    kinds = [type(module) for module in pipeline.unet.modules()]
    assert unet_patches.Upsample2D in kinds
    assert (unet_patches.FirstBlock in kinds) == (make is attends_first)


@pytest.mark.parametrize("make", [tiny_models.tiny_sd1, tiny_models.tiny_sd2])
def test_a_decoded_picture_is_the_same(make: Make, runner_of: Callable[[Make], ModelRunner]) -> None:
    pipeline = double(runner_of(make))
    latents = torch.randn(2, pipeline.vae.config.latent_channels, 6, 10, dtype=torch.float64)
    with torch.no_grad():
        expected = pipeline.vae.decode(latents, return_dict=False)[0]
        unet_patches.install(pipeline)
        assert torch.allclose(pipeline.vae.decode(latents, return_dict=False)[0], expected, atol=1e-5)
    assert any(isinstance(module, unet_patches.Upsample2D) for module in pipeline.vae.decoder.modules())


def test_single_precision_keeps_its_convolutions(runner_of: Callable[[Make], ModelRunner]) -> None:
    pipeline = runner_of(attends_first)._pipeline
    unet_patches.install(pipeline)
    kinds = [type(module) for module in (*pipeline.unet.modules(), *pipeline.vae.modules())]
    assert unet_patches.Upsample2D not in kinds
    assert unet_patches.FirstBlock in kinds


@pytest.mark.parametrize(("make", "first"), [(attends_first, 3), (tiny_models.tiny_sdxl, 5)])
def test_what_no_prompt_has_reached_is_computed_once_for_each_job(
    make: Make, first: int, runner_of: Callable[[Make], ModelRunner]
) -> None:
    """Five rows of three jobs."""
    runner = runner_of(make)
    unet_patches.install(runner._pipeline)
    seen: list[int] = []

    def kernel(query: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(len(query))
        return attention.sdpa(query, *more)

    for module, _ in attention.attentions(runner._pipeline):
        module.processor._kernel = kernel
    renders = [runner.prepare(Job(prompt="a cat", seed=1, guidance_scale=scale)) for scale in (7, 1, 3)]
    runner.step(renders)
    assert seen[0] == first
    assert set(seen[1:]) == {5}
