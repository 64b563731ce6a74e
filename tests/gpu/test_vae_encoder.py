"""SDXL's VAE encoder in fp16 on a real GPU, compiled by another process and captured as a CUDA graph."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import pytest
import torch

from tests import tiny_models
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner
from worker.device.vae.encoder import CALLS_BEFORE_COMPILING
from worker.model import half_vae

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

#: Least PSNR in decibels of a decoded picture whose latents are fp16's, against fp32's.
TOLERANCE_DB = 40.0
SIDE, THREADS, PICTURES = 256, 8, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL whose encoder overflows in plain fp16."""
    folder = tiny_models.tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    half_vae.divide_stream(vae.encoder, 2.0**-14)
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    cache = str(tmp_path_factory.mktemp("cache"))
    runner = ModelRunner(WorkerSettings(model=str(model), cache_dir=cache))
    for number in range(CALLS_BEFORE_COMPILING):
        latents_of(runner, number)
    assert runner._kernel_compiler is not None
    runner._kernel_compiler.submit(lambda: None).result(500)
    return runner


def latents_of(runner: ModelRunner, number: int) -> torch.Tensor:
    """Those of a picture of its own."""
    torch.cuda.set_device(runner._device)
    pixels = torch.rand((3, SIDE, SIDE), generator=torch.Generator().manual_seed(number)) * 2 - 1
    with torch.no_grad():
        return runner._vae_encoder.to_latents(pixels, torch.Generator().manual_seed(number))


def decibels(one: torch.Tensor, other: torch.Tensor, largest: float) -> float:
    return 10 * math.log10(largest**2 / max(float((one - other).square().mean()), 1e-12))


def test_latents_are_those_of_fp32(model: Path, compiled: ModelRunner) -> None:
    chosen = {choice.what: choice.choice for choice in compiled.choices}
    assert chosen["VAE encoder"] == "fp16"
    plain = ModelRunner(WorkerSettings(model=str(model), compile=False, dtype="fp32"))

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        family = plain._family
        with torch.no_grad():
            return family.decode(family.to_vae(family.lane(SIDE, SIDE), latents[None]))

    for number in range(3):
        found, right = (decoded(latents_of(runner, number)) for runner in (compiled, plain))
        assert decibels(found, right, 2.0) >= TOLERANCE_DB
    encoder = compiled._vae_encoder._compiled
    assert encoder is not None
    assert len(encoder._graphs.peaks) == 1


def test_many_threads_at_once_get_their_own_latents_on_any_stream(compiled: ModelRunner) -> None:
    right = [latents_of(compiled, number).cpu() for number in range(THREADS)]
    started = threading.Barrier(THREADS)

    def several(number: int) -> list[torch.Tensor]:
        torch.cuda.set_device(compiled._device)
        started.wait(60)
        with torch.cuda.stream(torch.cuda.Stream()):
            return [latents_of(compiled, number).cpu() for _ in range(PICTURES)]

    with ThreadPoolExecutor(THREADS) as threads:
        for number, found in enumerate(threads.map(several, range(THREADS))):
            largest = float(right[number].abs().max())
            assert min(decibels(each, right[number], largest) for each in found) >= 60
