"""The step as a function of tensors: its arithmetic, its padding, and that it compiles in one piece."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch._dynamo.utils import counters

from tests import tiny_models
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.cuda_graphs import MAX_ROWS, SPACING, batch_size
from worker.device.families import family_of
from worker.device.model_runner import ModelRunner
from worker.device.schedulers.schedule import SLOTS
from worker.device.step import Batch, batch_of, denoise
from worker.model import loader

ATTENDS_FIRST = functools.partial(tiny_models.tiny_sd1, attends_first=True)
SHAPE = (4, 8, 8)


def a_model(
    latents: torch.Tensor, times: torch.Tensor, conditions: Mapping[str, torch.Tensor], **more: Any
) -> torch.Tensor:
    """One whose output shows which row, time and text it was for, for latents of any number of axes."""
    text = conditions["text"].mean((1, 2))
    return latents * 2 + (times + text).view(-1, *[1] * (latents.ndim - 1))


def a_batch(shape: tuple[int, ...] = SHAPE) -> Batch:
    """Two jobs: the first with guidance 3, of rows 0 and 1; the second without, of row 2."""
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator)
    return Batch(
        states=draw(2, SLOTS, *shape),
        noise=draw(2, *shape),
        weights=draw(2, SLOTS, SLOTS + 2),
        input_scale=torch.tensor([0.5, 2.0]),
        guidance=torch.tensor([[3.0], [9.0]]),
        without=torch.tensor([0, 2]),
        prompted=torch.tensor([[1], [2]]),
        job_of_row=torch.tensor([0, 0, 1]),
        times=torch.tensor([7.0, 7.0, 11.0]),
        conditions={"text": draw(3, 5, 6)},
    )


@pytest.mark.parametrize("shape", [SHAPE, (10, 3), (7,)], ids=["image", "tokens", "vector"])
def test_a_step_is_scale_model_guidance_and_weights(shape: tuple[int, ...]) -> None:
    batch = a_batch(shape)
    states, predictions, finite = denoise(a_model, batch)
    text = batch.conditions["text"].mean((1, 2))
    scaled = [batch.states[0, 0] * 0.5, batch.states[1, 0] * 2.0]
    first = [scaled[0] * 2 + 7.0 + text[row] for row in (0, 1)]
    expected = [first[0] + 3.0 * (first[1] - first[0]), scaled[1] * 2 + 11.0 + text[2]]
    for job in range(2):
        assert torch.allclose(predictions[job], expected[job], atol=1e-5)
        sources = torch.stack([*batch.states[job], expected[job], batch.noise[job]])
        after = torch.einsum("st,t...->s...", batch.weights[job], sources)
        assert torch.allclose(states[job], after, atol=1e-4)
    assert finite.tolist() == [True, True]


@pytest.mark.parametrize("shape", [SHAPE, (10, 3), (7,)], ids=["image", "tokens", "vector"])
def test_rescaled_guidance_is_diffusers_and_the_other_jobs_keep_theirs_to_the_bit(
    shape: tuple[int, ...],
) -> None:
    def model(latents: torch.Tensor, *_: Any, **more: Any) -> torch.Tensor:
        """One whose rows differ in their deviation."""
        return latents * torch.arange(1.0, 1.0 + len(latents)).view(-1, *[1] * (latents.ndim - 1))

    plain = denoise(model, a_batch(shape))
    batch = replace(a_batch(shape), rescale=torch.tensor([0.7, 0.0]))
    states, predictions, _ = denoise(model, batch)
    prompted = batch.states[0, 0] * 0.5 * 2.0
    expected = rescale_noise_cfg(plain[1][:1], prompted[None], 0.7)
    assert torch.allclose(predictions[:1], expected, atol=1e-5)
    assert not torch.allclose(predictions[0], plain[1][0], atol=1e-3)
    assert torch.equal(predictions[1], plain[1][1])
    assert torch.equal(states[1], plain[0][1])


def test_a_batch_that_rescales_is_a_kind_of_its_own_and_no_other_is() -> None:
    batch = a_batch()
    rescaled = replace(batch, rescale=torch.tensor([0.7, 0.0]))
    assert batch.kind == "5 tokens"
    assert rescaled.kind == "5 tokens, some rescaled"
    assert len(rescaled.tensors()) == len(batch.tensors()) + 1
    assert not rescaled.zeros(jobs=5, rows=8).tensors()[-1].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_reported_for_its_own_job_alone(value: float) -> None:
    batch = a_batch()
    batch.states[1, 2, 3, 4, 5] = value
    expected = denoise(a_model, a_batch())
    states, _, finite = denoise(a_model, batch)
    assert finite.tolist() == [True, False]
    assert torch.equal(states[0], expected[0][0])


def test_a_batch_of_zeros_has_the_shapes_of_the_batch() -> None:
    batch = a_batch()
    zeros = batch.zeros(jobs=5, rows=8)
    for small, large in zip(batch.tensors(), zeros.tensors(), strict=True):
        assert small.shape[1:] == large.shape[1:]
        assert small.dtype == large.dtype
        assert len(large) == (5 if len(small) == 2 else 8)
        assert not large.any()


def test_a_batch_is_padded_to_the_smallest_captured_size_that_fits() -> None:
    sizes = [batch_size(rows) for rows in range(1, MAX_ROWS + 1)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    # At most a quarter of a batch is padding, or one row.
    assert all(size - rows <= max(1, size / 4) for rows, size in enumerate(sizes, 1))
    assert {limit for limit, _ in SPACING} <= set(sizes)


@pytest.mark.parametrize(
    ("make", "rescale"),
    [
        (ATTENDS_FIRST, 0.0),
        pytest.param(tiny_models.tiny_sdxl, 0.0, marks=pytest.mark.services),
        pytest.param(tiny_models.tiny_lcm, 0.0, marks=pytest.mark.services),
        pytest.param(functools.partial(ATTENDS_FIRST, inpainting=True), 0.0, marks=pytest.mark.services),
        pytest.param(ATTENDS_FIRST, 0.7, marks=pytest.mark.slow),
        pytest.param(functools.partial(tiny_models.tiny_sdxl, inpainting=True), 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_compiler_takes_a_step_in_one_piece_and_once_for_any_rows(
    make: Callable[[Path], Path], rescale: float, tmp_path: Path
) -> None:
    settings = WorkerSettings(model=str(make(tmp_path / "model")))
    loaded = loader.load(settings)
    family = family_of(loaded, compiled=True)
    runner = ModelRunner(settings, loaded, family)
    batch = batch_of(
        [runner.prepare(Job(prompt="a small cat", seed=1, steps=2, guidance_rescale=rescale)).next_inputs()]
    )
    torch._dynamo.reset()
    counters.clear()
    example = batch.zeros(jobs=4, rows=6)
    for tensor in example.tensors():
        torch._dynamo.mark_dynamic(tensor, 0)
    with torch.no_grad():
        compiled = torch.compile(
            functools.partial(denoise, family.forward), fullgraph=True, dynamic=False, backend="eager"
        )
        compiled(example)
        # On a CPU, convolutions have another way from 16 rows on.
        for jobs, rows in ((2, 2), (2, 4), (6, 6), (3, 12)):
            padded = batch.zeros(jobs, rows)
            for whole, part in zip(padded.tensors(), batch.tensors(), strict=True):
                whole[: len(part)] = part
            for one, other in zip(compiled(padded), denoise(family.forward, batch), strict=True):
                assert torch.allclose(one[:1].float(), other.float(), atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
