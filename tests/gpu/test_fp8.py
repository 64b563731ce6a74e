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
from worker.device import fp8
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
    ours = fp8.Fp8Linear(layer, outliers, fp8._out_dtype(layer.weight.device))
    given = fp8.quantise(torch.randn(2, tokens, width, device="cuda").half(), outliers)
    exact = fp8.scaled_product(
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
        assert psnr(one, other) > SAME_DB
        # A LoRA of a small rank changes little: more than rounding does.
        assert (psnr(one, unchanged) < psnr(one, other)) == bool(rank)


def test_quantising_is_fused_into_the_norm_before_it() -> None:
    """One kernel for both, and the product: in a profile of the compiled function."""
    torch.manual_seed(1)
    norm = torch.nn.LayerNorm(1280).half().cuda()
    layer = torch.nn.Linear(1280, 1280, bias=False).half().cuda().requires_grad_(False)
    ours = fp8.Fp8Linear(
        layer, fp8._outliers([layer], norm, fp8.OUTLIERS), fp8._out_dtype(layer.weight.device)
    )
    compiled = torch.compile(lambda x: ours(norm(x)), fullgraph=True)
    x = torch.randn(4, 1024, 1280, device="cuda").half()
    with torch.no_grad():
        compiled(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            compiled(x)
            torch.cuda.synchronize()
    kernels = [
        event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    triton = [name for name in kernels if name.startswith("triton")]
    assert len(triton) <= 2, kernels
