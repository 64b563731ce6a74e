"""FP8 on a real GPU: torch's product against the reference, and compiled steps, with LoRAs too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks.mates import psnr
from tests.lora_sets import random_set
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.fp8 import unet as fp8
from worker.device.fp8.layers import Fp8Linear
from worker.device.fp8.quantising import gated, normed, quantise, scaled_product
from worker.device.model_runner import ModelRunner

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

#: Least PSNR in decibels: of a compiled picture against an uncompiled one, both in FP8, where some values
#: round the other way; and of one in FP8 against fp16.
SAME_DB, QUALITY_DB = 30.0, 25.0


@pytest.fixture(scope="module", autouse=True)
def _has_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRunner]:
    """The bundled model: in fp16, in FP8 uncompiled, and in FP8 compiled with LoRAs."""
    cache = tmp_path_factory.mktemp("cache")

    def runner(**settings: Any) -> ModelRunner:
        return ModelRunner(WorkerSettings(cache_dir=str(Path(cache)), **settings))

    compiled = runner(precision="fp8")
    job = Job(prompt="a small cat", seed=1)
    assert compiled.compile(job)
    assert compiled.compile(job, loras=True)
    return {
        "fp16": runner(compile=False),
        "plain": runner(precision="fp8", compile=False),
        "compiled": compiled,
    }


def drawn(runner: ModelRunner, *, ranks: tuple[int, ...] = (0,) * 4) -> list[np.ndarray]:
    states = []
    for number, rank in enumerate(ranks):
        state = runner.prepare(Job(prompt="a small cat", seed=number, steps=12))
        if rank:
            state.loras = random_set(runner._family.adaptable(), number, rank, share=0.3)
        states.append(state)
    while left := [state for state in states if state.step < state.steps]:
        assert runner.step(left) == [None] * len(left)
    return [picture.pixels for picture in runner.decode(states)]


@pytest.mark.parametrize(
    ("tokens", "width", "out"), [(4096, 640, 640), (1024, 1280, 10240), (154, 1280, 1280)]
)
def test_the_product_is_the_references(tokens: int, width: int, out: int) -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(width, out).half().cuda().requires_grad_(False)
    outliers = fp8._outliers([layer], None, fp8.OUTLIERS)
    ours = Fp8Linear(layer, outliers, fp8._out_dtype(layer.weight.device))
    given = quantise(torch.randn(2, tokens, width, device="cuda").half(), outliers)
    exact = scaled_product(
        *(each.cpu() for each in (*given, ours.quantised, ours.scales)), out_dtype=torch.float32
    )
    error = (ours.product(given).float().cpu() - exact).norm() / exact.norm()
    assert -20 * math.log10(float(error)) > 50


def test_compiled_pictures_are_those_of_uncompiled_steps_and_near_fp16(
    runners: dict[str, ModelRunner],
) -> None:
    compiled, plain, half = (drawn(runners[name]) for name in ("compiled", "plain", "fp16"))
    assert runners["compiled"].is_compiled
    for one, other, exact in zip(compiled, plain, half, strict=True):
        assert psnr(one, other) > SAME_DB
        assert psnr(one, exact) > QUALITY_DB


def test_a_mixed_batch_with_loras_is_that_of_the_loop(runners: dict[str, ModelRunner]) -> None:
    ranks = (4, 0, 32, 128)
    compiled, plain = (drawn(runners[name], ranks=ranks) for name in ("compiled", "plain"))
    without = drawn(runners["compiled"])
    for rank, one, other, unchanged in zip(ranks, compiled, plain, without, strict=True):
        assert psnr(one, other) > SAME_DB, rank
        # A LoRA of a small rank changes no more than rounding does.
        if rank == 0:
            assert psnr(one, unchanged) > SAME_DB
        elif rank >= 32:
            assert psnr(one, unchanged) < psnr(one, other), rank


@pytest.mark.parametrize("width", [64, 640, 1280, 5120])
@pytest.mark.parametrize("count", [0, 16, 24])
def test_the_kernel_quantises_as_the_reference_does(width: int, count: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 77, width, device="cuda").half() * 10
    x[1, 5] = 0
    x[2, 3, 7] = math.inf
    outliers = torch.randperm(width, device="cuda")[:count].sort().values
    found, expected = quantise(x, outliers), quantise(x.cpu(), outliers.cpu())
    assert torch.allclose(found.scales.cpu(), expected.scales, rtol=1e-6)
    one, other = found.values.float().cpu(), expected.values.float()
    assert one[2, 3].isnan().any()
    assert other[2, 3].isnan().any()
    one[2, 3] = other[2, 3] = 0
    # A number between two of e4m3's may round the other way.
    assert (one == other).float().mean() > 0.999
    assert torch.allclose(one, other, rtol=0.13, atol=0.02)


@pytest.mark.parametrize("width", [64, 80, 640, 1280])
def test_the_norms_kernel_is_near_to_the_reference(width: int) -> None:
    torch.manual_seed(1)
    x = (torch.randn(3, 77, width, device="cuda") * 3 + 1).half()
    weight, bias = torch.randn(2, width, device="cuda").half()
    outliers = torch.randperm(width, device="cuda")[:16].sort().values
    found = normed(x, weight, bias, 1e-5, outliers)
    exact = (x.cpu().float(), weight.cpu().float(), bias.cpu().float())
    expected = normed(*exact, 1e-5, outliers.cpu())
    assert torch.allclose(found.scales.cpu(), expected.scales, rtol=1e-3)
    wanted, own = (each.values.float().cpu() * each.scales.cpu() for each in (expected, found))
    assert -20 * math.log10(float((wanted - own)[..., :width].norm() / wanted[..., :width].norm())) > 40


@pytest.mark.parametrize("width", [64, 2560, 5120])
def test_the_gates_kernel_is_near_to_the_reference(width: int) -> None:
    torch.manual_seed(1)
    y, bias = (
        torch.randn(2, 77, 2 * width, device="cuda").half(),
        torch.randn(2 * width, device="cuda").half(),
    )
    outliers = torch.arange(0, width, width // 16, device="cuda")
    found = gated(y, bias, outliers)
    expected = gated(y.cpu().float(), bias.cpu().float(), outliers.cpu())
    assert torch.allclose(found.scales.cpu(), expected.scales, rtol=1e-3)
    exact, own = (each.values.float().cpu() * each.scales.cpu() for each in (expected, found))
    assert -20 * math.log10(float((exact - own).norm() / exact.norm())) > 40
