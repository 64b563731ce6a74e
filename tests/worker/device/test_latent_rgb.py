"""Latents to RGB by a linear map, and a runner's previews."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from tests.tiny_models import tiny_sd1
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.latent_rgb import LatentRGB, of_vae
from worker.device.model_runner import ModelRunner


def test_each_pixel_is_its_latents_times_the_factors_and_the_bias() -> None:
    to_rgb = LatentRGB(((1.0, 0.0, 0.5), (0.0, 2.0, 0.0)), (0.1, 0.2, 0.3))
    latents = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    expected = torch.tensor([[[1.1, 2.1]], [[6.2, 8.2]], [[0.8, 1.3]]])
    torch.testing.assert_close(to_rgb(latents), expected)


def test_the_vaes_that_are_known() -> None:
    """By ComfyUI's `latent_rgb_factors`: a grey of SD's latents 0 is grey, and SDXL has a bias."""
    sd = of_vae(SimpleNamespace(latent_channels=4, scaling_factor=0.18215))
    xl = of_vae(SimpleNamespace(latent_channels=4, scaling_factor=0.13025))
    demo = of_vae(SimpleNamespace(latent_channels=16, scaling_factor=1.1508))
    assert sd is not None
    assert xl is not None
    assert demo is not None
    assert sd(torch.zeros(4, 1, 1)).tolist() == [[[0.0]]] * 3
    assert xl(torch.zeros(4, 1, 1)).flatten().tolist() == torch.tensor(xl.bias).tolist()
    assert len(demo.factors) == 16
    assert of_vae(SimpleNamespace(latent_channels=4, scaling_factor=0.5)) is None
    assert of_vae(SimpleNamespace()) is None


def test_a_preview_is_there_after_the_first_step_and_changes_nothing(tmp_path: Path) -> None:
    runner = ModelRunner(WorkerSettings(model=str(tiny_sd1(tmp_path / "m"))))
    job = Job(prompt="a cat", seed=1, steps=4, width=64, height=72)
    watched, alone = runner.prepare(job), runner.prepare(job)
    assert runner.preview(watched) is None
    shown = []
    while watched.step < watched.steps:
        assert runner.step([watched]) == runner.step([alone]) == [None]
        pixels = runner.preview(watched)
        assert pixels is not None
        assert (pixels.shape, str(pixels.dtype)) == ((9, 8, 3), "uint8")
        shown.append(pixels.tolist())
    assert shown[0] != shown[-1]
    assert torch.equal(watched.latents, alone.latents)
