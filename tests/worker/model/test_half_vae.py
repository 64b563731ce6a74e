"""A VAE whose values are too large for fp16, decoded and encoded in fp16."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from tests import tiny_models
from worker.contract.settings import WorkerSettings
from worker.device.families import family_of
from worker.device.vae.encoder import VaeEncoder
from worker.model import half_vae, loader


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
        dtype = vae.decoder.conv_in.weight.dtype
        images: torch.Tensor = vae.decode(latents.to(dtype), return_dict=False)[0]
    return images.float()


def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """The mean and the logarithm of the variance."""
    with torch.no_grad():
        dtype = vae.encoder.conv_in.weight.dtype
        moments: torch.Tensor = vae.encode(pixels.to(dtype)).latent_dist.parameters
    return moments.float()


def dtypes(vae: AutoencoderKL) -> dict[str, torch.dtype]:
    """Of each part's weights."""
    return {name: next(each.parameters()).dtype for name, each in vae.named_children()}


LATENTS = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(1)) / 0.18215
PIXELS = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
#: Each part of a VAE: its name, how it is run and converted, on what, and of what range its output is.
PARTS = pytest.mark.parametrize(
    ("part", "run", "to_half", "given"),
    [
        ("decoder", decode, half_vae.decoder_to_half, LATENTS),
        ("encoder", encode, half_vae.encoder_to_half, PIXELS),
    ],
)
Run = Callable[[AutoencoderKL, torch.Tensor], torch.Tensor]
ToHalf = Callable[[AutoencoderKL], half_vae.Half]


@PARTS
@pytest.mark.parametrize("config", [{}, {"mid_block_add_attention": False}, {"layers_per_block": 2}])
@pytest.mark.parametrize("power", [-8, 3, 12])
def test_a_divided_stream_gives_the_same(
    part: str, run: Run, to_half: ToHalf, given: torch.Tensor, config: dict[str, Any], power: int
) -> None:
    vae = vae_of(**config).double()
    before = run(vae, given)
    half_vae.divide_stream(getattr(vae, part), 2.0**power)
    assert (run(vae, given) - before).abs().max() < 1e-6


@PARTS
def test_values_too_large_for_fp16_work_in_fp16(
    part: str, run: Run, to_half: ToHalf, given: torch.Tensor
) -> None:
    vae = vae_of()
    half_vae.divide_stream(getattr(vae, part), 2.0**-14)
    right = run(vae, given)
    plain = vae_of()
    plain.load_state_dict(vae.state_dict())
    assert not run(plain.half(), given).isfinite().all()
    said = to_half(vae)
    assert said[:2] == (f"VAE {part}", "fp16")
    assert said.reason.startswith("its values, which reach ")
    psnr = 10 * math.log10(right.square().max() / (run(vae, given) - right).square().mean())
    assert psnr > 60


@pytest.mark.parametrize("shade", [-1.0, 0.0, 1.0])
def test_a_picture_of_one_colour_is_encoded_in_fp16(shade: float) -> None:
    """What is added in a group norm must not be lost, for the deviation may be nearly 0."""
    vae = vae_of()
    half_vae.divide_stream(vae.encoder, 2.0**-14)
    pixels = torch.full_like(PIXELS, shade)
    right = encode(vae, pixels)
    half_vae.to_half(vae)
    psnr = 10 * math.log10(right.square().max() / (encode(vae, pixels) - right).square().mean())
    assert psnr > 50


def test_a_picture_goes_through_both_parts_in_fp16() -> None:
    def there_and_back(vae: AutoencoderKL) -> torch.Tensor:
        return decode(vae, encode(vae, PIXELS).chunk(2, dim=1)[0])

    vae = vae_of()
    for part in (vae.encoder, vae.decoder):
        half_vae.divide_stream(part, 2.0**-14)
    right = there_and_back(vae)
    assert [said[:2] for said in half_vae.to_half(vae)] == [("VAE decoder", "fp16"), ("VAE encoder", "fp16")]
    assert set(dtypes(vae).values()) == {torch.float16}
    psnr = 10 * math.log10(4 / (there_and_back(vae) - right).square().mean())
    assert psnr > 50


@PARTS
def test_one_that_needs_no_division_is_not_divided_by_more_than_its_margin(
    part: str, run: Run, to_half: ToHalf, given: torch.Tensor
) -> None:
    vae = vae_of()
    weight = getattr(vae, part).conv_in.weight
    before = weight.clone()
    to_half(vae)
    ratio = before.abs().max() / getattr(vae, part).conv_in.weight.float().abs().max()
    assert 1 <= ratio.round() <= 2**half_vae._MARGIN


@PARTS
def test_what_is_not_known_or_reaches_too_far_stays_in_fp32(
    part: str, run: Run, to_half: ToHalf, given: torch.Tensor
) -> None:
    vae = vae_of()
    getattr(vae, part).mid_block.resnets[0].output_scale_factor = 2.0
    assert to_half(vae) == (f"VAE {part}", "fp32", f"its {part} has blocks of an unknown kind")
    far = vae_of()
    half_vae.divide_stream(getattr(far, part), 2.0**-40)
    assert to_half(far).reason.startswith("its values reach ")
    broken = vae_of()
    getattr(broken, part).conv_in.bias.data[0] = math.nan
    assert to_half(broken).reason == "its values reach nan"
    for each in (vae, far, broken):
        assert set(dtypes(each).values()) == {torch.float32}


def test_a_part_that_stays_in_fp32_does_not_keep_the_other_one_there() -> None:
    vae = vae_of().half()
    vae.encoder.down_blocks[0].downsamplers[0].norm = torch.nn.LayerNorm(8)
    assert [said.dtype for said in half_vae.to_half(vae)] == ["fp16", "fp32"]
    assert dtypes(vae) == {
        "encoder": torch.float32,
        "decoder": torch.float16,
        "quant_conv": torch.float32,
        "post_quant_conv": torch.float16,
    }


def test_a_tiny_vae_is_of_an_unknown_kind() -> None:
    tiny = AutoencoderTiny()
    assert [said.dtype for said in half_vae.to_half(tiny)] == ["fp32", "fp32"]


@pytest.mark.parametrize(
    ("upcast", "parts"),
    [(True, {"VAE decoder": "fp16", "VAE encoder": "fp16"}), (False, {"VAE encoder": "fp16"})],
)
def test_sdxl_in_fp16_gives_the_latents_of_fp32(tmp_path: Path, upcast: bool, parts: dict[str, str]) -> None:
    model = tiny_models.tiny_sdxl(tmp_path / "xl")
    config = model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": upcast}))
    latents = []
    for dtype in ("fp32", "fp16"):
        loaded = loader.load(WorkerSettings(model=str(model), dtype=dtype))
        encoder = VaeEncoder(family_of(loaded, compiled=False))
        latents.append(encoder.to_latents(PIXELS[0], torch.Generator().manual_seed(0)))
        chosen = {each.what: each.choice for each in loaded.choices if each.what.startswith("VAE")}
        assert chosen == (parts if dtype == "fp16" else {})
    right, found = latents
    assert found.dtype == torch.float32
    assert 10 * math.log10(right.square().max() / (found - right).square().mean()) > 60
