"""Layers with LoRAs: by the operators that a GPU has, traced as there, against the loop over jobs.

The operators' kernels are played by plain torch, which reads the factors where the table says they are.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch.nn import functional

from tests import tiny_models
from tests.lora_sets import random_set
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device import unet_patches
from worker.device.families import family_of
from worker.device.loras import layers, operators
from worker.device.loras.job_set import RowLoras
from worker.device.model_runner import ModelRunner
from worker.device.step import Batch, batch_of, denoise
from worker.model import loader

attends_first = functools.partial(tiny_models.tiny_sd1, attends_first=True)
#: Guidance, rank and share of layers of each job; rank 0: it has no LoRA.
JOBS = ((7.0, 4, 0.5), (1.0, 0, 0.0), (3.0, 20, 1.0), (7.0, 0, 0.0), (1.0, 130, 0.8))


class PlainProducts:
    """What `worker.device.loras.products` does, on a CPU."""

    @staticmethod
    def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        size = count * torch.empty((), dtype=dtype).element_size()
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)

    @staticmethod
    def _entry(table: torch.Tensor, job: Any, layer: int) -> tuple[int, int, int, float, int]:
        down, up, rank, bits, after = table[int(job), layer].tolist()
        return down, up, rank, struct.unpack("<f", struct.pack("<i", bits))[0], after

    @classmethod
    def low_of(
        cls, x: torch.Tensor, table: torch.Tensor, owners: torch.Tensor, layer: int, streams: int, most: int
    ) -> torch.Tensor:
        low = x.new_zeros((streams, *x.shape[:2], most))
        for stream in range(streams):
            for row, job in enumerate(owners):
                down, _, rank, *_ = cls._entry(table, job, layer + stream)
                if rank:
                    low[stream, row, :, :rank] = x[row] @ cls._at(down, (rank, x.shape[2]), x.dtype).T
        return low

    @classmethod
    def conv_low_of(
        cls,
        x: torch.Tensor,
        table: torch.Tensor,
        owners: torch.Tensor,
        layer: int,
        most: int,
        *,
        kernel: tuple[int, int],
        stride: int,
        padding: int,
        scale: int,
    ) -> torch.Tensor:
        x = functional.interpolate(x, scale_factor=float(scale)) if scale > 1 else x
        rows = []
        for row, job in zip(x, owners, strict=False):
            down, _, rank, *_ = cls._entry(table, job, layer)
            factor = cls._at(down, (rank, kernel[0] * kernel[1], x.shape[1]), x.dtype) if rank else None
            weight = x.new_zeros((1, x.shape[1], *kernel))
            if factor is not None:
                weight = layers.as_kernel(factor, kernel)
            low = functional.conv2d(row[None], weight, stride=stride, padding=padding)[0].flatten(1).T
            rows.append(functional.pad(low, (0, most - low.shape[1])))
        return torch.stack(rows)[None]

    @classmethod
    def add_up(
        cls,
        outputs: list[torch.Tensor],
        low: torch.Tensor,
        table: torch.Tensor,
        owners: torch.Tensor,
        layer: int,
    ) -> None:
        for stream, output in enumerate(outputs):
            width = output.shape[2]
            for row, job in zip(range(len(output)), owners, strict=False):
                _, up, rank, scale, after = cls._entry(table, job, layer + stream)
                if rank:
                    output[row] *= cls._at(after, (width,), torch.float32) if after else 1
                    output[row] += (
                        scale * low[stream, row, :, :rank] @ cls._at(up, (rank, width), output.dtype)
                    )

    @classmethod
    def add(
        cls,
        x: torch.Tensor,
        outputs: list[torch.Tensor],
        table: torch.Tensor,
        owners: torch.Tensor,
        layer: int,
        most: int,
    ) -> None:
        cls.add_up(outputs, cls.low_of(x, table, owners, layer, len(outputs), most), table, owners, layer)

    @classmethod
    def add_convolved(
        cls,
        x: torch.Tensor,
        output: torch.Tensor,
        table: torch.Tensor,
        owners: torch.Tensor,
        layer: int,
        most: int,
        **options: Any,
    ) -> None:
        low = cls.conv_low_of(x, table, owners, layer, most, **options)
        cls.add_up([output.permute(0, 2, 3, 1).flatten(1, 2)], low, table, owners, layer)

    @classmethod
    def gated(
        cls,
        x: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor,
        table: torch.Tensor,
        owners: torch.Tensor,
        layer: int,
        most: int,
    ) -> torch.Tensor:
        y = y.clone()
        cls.add(x, [y], table, owners, layer, most)
        value, gate = (y + bias).chunk(2, dim=-1)
        return value * functional.gelu(gate)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_products", lambda: PlainProducts)
    # As in compiled steps, which is where the kernels are.
    monkeypatch.setattr(unet_patches.Upsample2D, "always", True)


def a_runner(path: Path, *, patched: bool, precision: Literal["fp16", "fp8"] = "fp16") -> ModelRunner:
    """On a CPU, as where steps are compiled if `patched`."""
    settings = WorkerSettings(model=str(path), precision=precision)
    loaded = loader.load(settings)
    if patched:
        # The upsamplers' patches are for half precision.
        loaded.pipeline.unet.half()
    runner = ModelRunner(settings, loaded, family_of(loaded, compiled=patched))
    loaded.pipeline.unet.float()
    return runner


def a_batch(runner: ModelRunner, *, wide: bool) -> Batch:
    inputs = []
    for number, (guidance, rank, share) in enumerate(JOBS):
        job = Job(prompt=f"cat {number}", seed=number, guidance_scale=guidance, width=64, height=64)
        state = runner.prepare(job)
        if rank:
            adaptable: Any = runner._family.adaptable()
            state.loras = random_set(adaptable, number, rank, wide=wide, dora=number == 2, share=share)
        inputs.append(state.next_inputs())
    return batch_of(inputs)


def stepped(runner: ModelRunner, batch: Batch, *, by_kernel: bool) -> torch.Tensor:
    with torch.no_grad():
        runner._family._lora_unet._has_kernels = by_kernel  # type: ignore[attr-defined]
        return denoise(runner._family.forward, batch)[0]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_the_operators_do_what_the_loop_does_and_leave_mates_as_they_are(
    tmp_path: Path, precision: Literal["fp16", "fp8"]
) -> None:
    runner = a_runner(attends_first(tmp_path / "model"), patched=True, precision=precision)
    batch = a_batch(runner, wide=True)
    expected = stepped(runner, batch, by_kernel=False)
    # Weights of upsamplers were added up and rounded; in FP8 that makes some values round the other way.
    near = 1e-3 if precision == "fp16" else 2e-2
    assert torch.allclose(stepped(runner, batch, by_kernel=True), expected, atol=near)
    without = stepped(runner, dataclasses.replace(batch, loras=None), by_kernel=False)
    moved = (expected - without).abs().amax(dim=(1, 2, 3, 4))
    for (_, rank, _), far in zip(JOBS, moved.tolist(), strict=True):
        assert far > 0.1 if rank else far < near


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "fp8"])
@pytest.mark.parametrize("make", [attends_first, tiny_models.tiny_sd2, tiny_models.tiny_sdxl])
def test_a_step_is_traced_once_for_all_rows_ranks_and_loras(
    make: Callable[[Path], Path], precision: Literal["fp16", "fp8"], wide: bool, tmp_path: Path
) -> None:
    runner = a_runner(make(tmp_path / "model"), patched=True, precision=precision)
    batch = a_batch(runner, wide=wide)
    expected = stepped(runner, batch, by_kernel=True)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = torch.compile(
        functools.partial(denoise, runner._family.forward), backend=backend, fullgraph=True, dynamic=False
    )
    assert batch.loras is not None
    padded = dataclasses.replace(batch, loras=batch.loras.padded(8))
    example = dataclasses.replace(batch, loras=dataclasses.replace(batch.loras, room=batch.loras.room[:32]))
    example = example.zeros(jobs=4, rows=6)
    inputs = padded.zeros(jobs=8, rows=10)
    for tensor in example.tensors():
        torch._dynamo.mark_dynamic(tensor, 0)
    for place, value in zip(inputs.tensors(), padded.tensors(), strict=True):
        place[: len(value)].copy_(value)
    with torch.no_grad():
        function(example)
        output = function(inputs)[0]
    assert len(graphs) == 1
    assert torch.allclose(output[: len(JOBS)], expected, atol=1e-4)


@pytest.mark.slow
def test_the_traced_step_without_loras_is_the_same_whether_or_not_others_have_some(tmp_path: Path) -> None:
    """Not the same results alone: the same code."""
    path = tiny_models.tiny_sdxl(tmp_path / "model")
    codes = []
    for has_loras in (False, True):
        runner = a_runner(path, patched=True)
        batch = a_batch(runner, wide=True)
        if has_loras:
            stepped(runner, batch, by_kernel=False)
        torch._dynamo.reset()

        def backend(graph: Any, _: Any) -> Any:
            codes.append(graph.code)
            return graph.forward

        example = dataclasses.replace(batch, loras=None).zeros(jobs=4, rows=6)
        with torch.no_grad():
            torch.compile(
                functools.partial(denoise, runner._family.forward), backend=backend, fullgraph=True
            )(example)
    assert codes[0] == codes[1]


def test_a_process_that_only_compiles_has_the_layers_for_loras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets a batch of a worker's, and loads no LoRA of its own."""
    path = attends_first(tmp_path / "model")
    batch = a_batch(a_runner(path, patched=True), wide=True)
    other = a_runner(path, patched=True)
    lanes = SimpleNamespace(
        what="step", record=lambda lane, given, dynamic: stepped(other, given, by_kernel=False)
    )
    monkeypatch.setattr(other, "_graphs", SimpleNamespace(lanes=lanes))
    result: Any = other.compile_like("step", "a lane", batch.zeros(jobs=4, rows=6), [])
    assert result.isfinite().all()


def test_a_batch_without_loras_has_none() -> None:
    assert RowLoras.of([None, None]) is None
