"""Tiles of a VAE of Stable Diffusion's size on a real GPU: as the whole, in a part of its memory."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch

from tests.worker.device.test_vae_tiles import LEAST_DB, decibels, noise
from worker.device.vae import tiles

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

SIDE = 1024


def measured(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What it gives, and the bytes that it took beside what was there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_tiles_are_near_to_the_whole_in_half_of_its_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ).eval()
    vae.to("cuda", dtype).to(memory_format=torch.channels_last)
    pixels = noise(1, 3, SIDE, SIDE).to("cuda", dtype)
    latents = noise(1, 4, SIDE // 8, SIDE // 8).to("cuda", dtype)
    for whole, in_tiles in (
        (
            lambda: vae.encode(pixels).latent_dist.parameters,
            lambda: tiles.encode(vae, pixels).latent_dist.parameters,
        ),
        (lambda: vae.decode(latents).sample, lambda: tiles.decode(vae, latents)),
    ):
        (expected, most), (found, least) = measured(whole), measured(in_tiles)
        assert decibels(found, expected) >= LEAST_DB
        assert least < most / 2
