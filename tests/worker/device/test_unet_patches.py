"""Patched modules against those they stand for, in double precision, in which rounding hides no error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import upsampling

from tests import tiny_models
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device import attention, unet_patches
from worker.device.families import family_of
from worker.device.model_runner import ModelRunner
from worker.device.step import Batch, batch_of, denoise
from worker.model import loader

attends_first = functools.partial(tiny_models.tiny_sd1, attends_first=True)
MODELS = [
    attends_first,
    tiny_models.tiny_sd1,
    tiny_models.tiny_sd2,
    tiny_models.tiny_sdxl,
    tiny_models.tiny_lcm,
]
Make = Callable[[Path], Path]


@dataclass
class Patchable:
    """A tiny model on a CPU, with patches or without: the same weights in both."""

    folder: Path

    def load(self, *, patched: bool, dtype: torch.dtype = torch.float32) -> tuple[ModelRunner, Any]:
        """A runner, as it is made where steps are compiled or where they are not, and its pipeline.

        `dtype` other than single precision: of the UNet and the VAE, before they are patched.
        """
        settings = WorkerSettings(model=str(self.folder))
        loaded = loader.load(settings)
        pipeline = loaded.pipeline
        pipeline.unet.to(dtype)
        pipeline.vae.to(dtype)
        return ModelRunner(settings, loaded, family_of(loaded, compiled=patched)), pipeline


def a_batch(runner: ModelRunner) -> Batch:
    """Jobs with guidance and without, in double precision."""
    jobs = [
        Job(prompt=f"cat {seed}", seed=seed, guidance_scale=scale) for seed, scale in enumerate((7, 1, 3))
    ]
    batch = batch_of([runner.prepare(job).next_inputs() for job in jobs])
    return dataclasses.replace(
        batch, conditions={name: tensor.double() for name, tensor in batch.conditions.items()}
    )


@pytest.fixture(autouse=True)
def patches_serve_uncompiled_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet_patches.Upsample2D, "always", True)


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[Make], Patchable]:
    return lambda make: Patchable(make(tmp_path / "model"))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 4)])
def test_upsampling_by_phases_is_upsampling(height: int, width: int) -> None:
    torch.manual_seed(0)
    original = upsampling.Upsample2D(6, use_conv=True, out_channels=5).double()
    hidden_states = torch.randn(2, 6, height, width, dtype=torch.float64)
    patched = unet_patches.Upsample2D(original)
    patched.weight.data = unet_patches._phases(original.conv.weight)
    with torch.no_grad():
        assert torch.allclose(patched(hidden_states), original(hidden_states), atol=1e-12)
        size = (2 * height - 1, 2 * width - 1)
        assert torch.equal(patched(hidden_states, size), original(hidden_states, size))


@pytest.mark.parametrize("make", MODELS)
def test_a_step_is_the_same(make: Make, model_of: Callable[[Make], Patchable]) -> None:
    model = model_of(make)
    plain, _ = model.load(patched=False, dtype=torch.float64)
    patched, pipeline = model.load(patched=True, dtype=torch.float64)
    batch = a_batch(plain)
    with torch.no_grad():
        expected = denoise(plain._family.forward, batch)
        for one, other in zip(denoise(patched._family.forward, batch), expected, strict=True):
            # Weights that were added up are rounded to single precision.
            assert torch.allclose(one.double(), other.double(), atol=1e-5)
    kinds = [type(module) for module in pipeline.unet.modules()]
    assert unet_patches.Upsample2D in kinds
    assert (unet_patches.FirstBlock in kinds) == (make is attends_first)


@pytest.mark.parametrize("make", [tiny_models.tiny_sd1, tiny_models.tiny_sd2])
def test_a_decoded_picture_is_the_same(make: Make, model_of: Callable[[Make], Patchable]) -> None:
    model = model_of(make)
    (_, plain), (_, patched) = (model.load(patched=each, dtype=torch.float64) for each in (False, True))
    latents = torch.randn(2, plain.vae.config.latent_channels, 6, 10, dtype=torch.float64)
    with torch.no_grad():
        expected = plain.vae.decode(latents, return_dict=False)[0]
        assert torch.allclose(patched.vae.decode(latents, return_dict=False)[0], expected, atol=1e-5)
    assert any(isinstance(module, unet_patches.Upsample2D) for module in patched.vae.decoder.modules())


def test_single_precision_keeps_its_convolutions(model_of: Callable[[Make], Patchable]) -> None:
    _, pipeline = model_of(attends_first).load(patched=True)
    kinds = [type(module) for module in (*pipeline.unet.modules(), *pipeline.vae.modules())]
    assert unet_patches.Upsample2D not in kinds
    assert unet_patches.FirstBlock in kinds


def rows_seen(runner: ModelRunner) -> list[int]:
    """The rows of each attention of the UNet in one step of three jobs, of which two are guided: five rows.

    Everything but the kernels is as the runner was made.
    """
    seen: list[int] = []

    def kernel(query: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(len(query))
        return attention.sdpa(query, *more)

    for layer in runner._family.attentions():
        layer.module.processor._kernel = kernel
    jobs = [Job(prompt="a cat", seed=1, guidance_scale=scale) for scale in (7, 1, 3)]
    assert runner.step([runner.prepare(job) for job in jobs]) == [None] * 3
    return seen


@pytest.mark.parametrize(
    ("make", "first"),
    [(attends_first, 3), (tiny_models.tiny_sd1, 3), (tiny_models.tiny_sd2, 3), (tiny_models.tiny_sdxl, 5)],
)
def test_a_runner_computes_the_first_attention_once_for_each_job_where_no_prompt_has_reached_it(
    make: Make, first: int, model_of: Callable[[Make], Patchable]
) -> None:
    """SDXL's prompt is in the embedding of the timestep. Without patches, every row is computed."""
    model = model_of(make)
    seen = rows_seen(model.load(patched=True)[0])
    assert seen[0] == first
    assert set(seen[1:]) == {5}
    assert set(rows_seen(model.load(patched=False)[0])) == {5}


def test_choosing_attention_again_undoes_nothing(
    model_of: Callable[[Make], Patchable], tmp_path: Path
) -> None:
    """As an attention backend does that is chosen after the patches."""
    runner, _ = model_of(attends_first).load(patched=True)
    for backend in ("naive", "sdpa"):
        layers = list(runner._family.attentions())
        attention.install(layers, backend, torch.device("cpu"), tmp_path / "attention.json")
        assert rows_seen(runner)[0] == 3
