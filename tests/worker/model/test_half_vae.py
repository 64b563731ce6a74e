"""A VAE whose values are too large for fp16, decoded in fp16."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from worker.model import half_vae


def vae_of(**config: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    small = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    vae: AutoencoderKL = AutoencoderKL(**small | config).eval().requires_grad_(False)
    for weight in vae.parameters():  # Those of norms and biases too, which begin at 1 and 0.
        weight.data += 0.1 * torch.randn(weight.shape)
    return vae


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        images: torch.Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return images.float()


LATENTS = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(1)) / 0.18215


@pytest.mark.parametrize("config", [{}, {"mid_block_add_attention": False}, {"layers_per_block": 2}])
@pytest.mark.parametrize("power", [-8, 3, 12])
def test_a_divided_stream_gives_the_same_pixels(config: dict[str, Any], power: int) -> None:
    vae = vae_of(**config).double()
    before = decode(vae, LATENTS)
    half_vae.divide_stream(vae.decoder, 2.0**power)
    assert (decode(vae, LATENTS) - before).abs().max() < 1e-6


def test_values_too_large_for_fp16_are_decoded_in_fp16() -> None:
    vae = vae_of()
    half_vae.divide_stream(vae.decoder, 2.0**-14)
    right = decode(vae, LATENTS)
    plain = vae_of()
    plain.load_state_dict(vae.state_dict())
    assert not decode(plain.half(), LATENTS).isfinite().all()
    said = half_vae.to_half(vae)
    assert vae.dtype == torch.float16
    assert said.startswith("fp16: its values, which reach ")
    psnr = 10 * math.log10(4 / (decode(vae, LATENTS) - right).square().mean())
    assert psnr > 60


def test_one_that_needs_no_division_is_not_divided_by_more_than_its_margin() -> None:
    vae = vae_of()
    before = vae.decoder.conv_in.weight.clone()
    half_vae.to_half(vae)
    ratio = before.abs().max() / vae.decoder.conv_in.weight.float().abs().max()
    assert 1 <= ratio.round() <= 2**half_vae._MARGIN


def test_what_is_not_known_or_reaches_too_far_stays_in_fp32() -> None:
    vae = vae_of()
    vae.decoder.mid_block.resnets[0].output_scale_factor = 2.0
    assert half_vae.to_half(vae) == "fp32: its decoder has blocks of an unknown kind"
    far = vae_of()
    half_vae.divide_stream(far.decoder, 2.0**-40)
    assert half_vae.to_half(far).startswith("fp32: its values reach ")
    broken = vae_of()
    broken.decoder.conv_in.bias.data[0] = math.nan
    assert half_vae.to_half(broken) == "fp32: its values reach nan"
    assert {vae.dtype, far.dtype, broken.dtype} == {torch.float32}
