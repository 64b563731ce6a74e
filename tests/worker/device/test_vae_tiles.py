"""Pictures in tiles: they are what the whole gives, encoded and decoded, with less memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny_models
from tests.worker.device.test_second_pass import REFERENCE, Model, a_job, upscaled
from worker.contract.errors import JobTooLargeError, OutOfMemoryError
from worker.device.model_runner import ModelRunner
from worker.device.vae import tiles
from worker.device.vae.decoder import IN_TILES, NOT_WHOLE
from worker.device.vae.encoder import NOT_WHOLE as NOT_ENCODED_WHOLE
from worker.device.vae.encoder import VaeEncoder
from worker.model.memory_plan import Decoding

ROOT = Path(__file__).parents[3]
#: Least PSNR in decibels of tiles beside the whole.
LEAST_DB = 40.0


def decibels(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio: the peak is the range of values in `other`."""
    one, other = one.double(), other.double()
    error = (one - other).square().mean().clamp(min=1e-30)
    return float(10 * torch.log10((other.max() - other.min()).square() / error))


def a_vae(**more: Any) -> Any:
    """One of random weights, with attention in the middle, as Stable Diffusion's have it."""
    torch.manual_seed(0)
    return tiny_models.vae(**{"channels": 4, "levels": 4, "layers_per_block": 2, **more}).eval()


VAES: dict[str, dict[str, Any]] = {
    "as Stable Diffusion's": {},
    "as the bundled model's": {
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "of three levels": {"levels": 3, "channels": 8},
}


def noise(*shape: int) -> torch.Tensor:
    """Values of -1 to 1 that differ in each corner, so that each tile has statistics of its own."""
    generator = torch.Generator().manual_seed(1)
    slope = torch.linspace(-0.5, 0.5, shape[-1]) + torch.linspace(-0.5, 0.5, shape[-2])[:, None]
    return (slope + 0.3 * torch.randn(shape, generator=generator)).clamp(-1, 1)


# --- encoding and decoding ----------------------------------------------------------------------------------


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """And attention of few queries at a time."""
    monkeypatch.setattr(tiles, "SIDE", 32)
    monkeypatch.setattr(tiles, "PAIRS", 500)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in VAES), ("as Stable Diffusion's", torch.bfloat16)],
)
@torch.no_grad()
def test_tiles_are_the_whole_but_for_rounding(name: str, dtype: torch.dtype) -> None:
    vae = a_vae(**VAES[name]).to(dtype)
    weights = {key: value.clone() for key, value in vae.state_dict().items()}
    assert tiles.is_known(vae)
    least = 100.0 if dtype == torch.float32 else LEAST_DB
    for height, width in ((40, 72), (8, 64)):
        pixels = noise(1, 3, height, width).to(dtype)
        whole = vae.encode(pixels).latent_dist
        tiled = tiles.encode(vae, pixels).latent_dist
        assert decibels(tiled.mean, whole.mean) >= least
        assert decibels(tiled.std, whole.std) >= least
        latents = noise(*whole.mean.shape).to(dtype)
        assert decibels(tiles.decode(vae, latents), vae.decode(latents).sample) >= least
    assert all(torch.equal(value, weights[key]) for key, value in vae.state_dict().items())


@torch.no_grad()
def test_they_are_nearer_to_the_whole_than_diffusers_own() -> None:
    """diffusers 0.42.1: each of its tiles has norms and attention of its own."""
    vae = a_vae()
    pixels, latents = noise(1, 3, 128, 128), noise(1, 4, 16, 16)
    whole = vae.encode(pixels).latent_dist.parameters, vae.decode(latents).sample
    ours = tiles.encode(vae, pixels).latent_dist.parameters, tiles.decode(vae, latents)
    vae.enable_tiling()
    theirs = vae.encode(pixels).latent_dist.parameters, vae.decode(latents).sample
    for found, other, expected in zip(ours, theirs, whole, strict=True):
        assert decibels(found, expected) >= 100 > LEAST_DB > decibels(other, expected)


class Largest(TorchDispatchMode):
    """Notes the most values that a tensor has while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.values = max(self.values, *sizes, 0)
        return result


@torch.no_grad()
def test_no_tensor_is_as_large_as_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SIDE", 32)
    monkeypatch.setattr(tiles, "PAIRS", 1 << 10)
    vae = a_vae()
    pixels, latents = noise(1, 3, 128, 128), noise(1, 4, 16, 16)
    most = []
    for run in (
        lambda: (vae.encode(pixels), vae.decode(latents)),
        lambda: (tiles.encode(vae, pixels), tiles.decode(vae, latents)),
    ):
        with Largest() as largest:
            run()
        most.append(largest.values)
    # The picture itself beside 8 channels of all its pixels.
    assert most[1] == pixels.numel() < most[0] / 2


def test_vaes_of_other_kinds_have_no_tiles() -> None:
    assert not tiles.is_known(diffusers.AutoencoderTiny())
    blocks = ("AttnUpDecoderBlock2D",) * 2
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=blocks,
        norm_num_groups=4,
    )
    assert not tiles.is_known(model)


# --- when pictures are encoded in tiles ---------------------------------------------------------------------


class Family:
    """Out of memory as often as it is told."""

    def __init__(self, *fails: bool, has_tiles: bool = True) -> None:
        self._fails, self.has_tiles = iter(fails), has_tiles
        self.asked: list[bool] = []

    def to_encoder(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[None]

    def encode_picture(self, pixels: torch.Tensor, *, in_tiles: bool = False) -> torch.Tensor:
        self.asked.append(in_tiles)
        if next(self._fails, False):
            raise torch.OutOfMemoryError("out of memory")
        return pixels

    def drawn_latents(self, encoded: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return encoded.mean() + torch.randn(3, generator=generator)


def encoded(encoder: VaeEncoder, side: int = 8) -> torch.Tensor:
    return encoder.to_latents(torch.zeros(3, side, side), torch.Generator().manual_seed(0))


def test_where_the_whole_does_not_fit_there_are_tiles_with_the_same_draws_and_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    family: Any = Family(False, True)
    encoder = VaeEncoder(family)
    whole, *tiled = (encoded(encoder) for _ in range(3))
    assert all(torch.equal(each, whole) for each in tiled)
    encoded(encoder, 16)
    assert family.asked == [False, False, True, True, False]
    assert caplog.messages == [NOT_ENCODED_WHOLE % (8, 8)]


def test_where_tiles_do_not_fit_either_it_is_said_and_tried_again() -> None:
    family: Any = Family(True, True)
    encoder = VaeEncoder(family)
    with pytest.raises(OutOfMemoryError, match="encode the image in tiles"):
        encoded(encoder)
    encoded(encoder)
    assert family.asked == [False, True, False]


def test_a_family_without_tiles_is_not_asked_for_them() -> None:
    family: Any = Family(True, has_tiles=False)
    with pytest.raises(OutOfMemoryError):
        encoded(VaeEncoder(family, Decoding(8, tiled=True)))
    assert family.asked == [False]


def test_what_is_planned_in_tiles_is_never_tried_whole() -> None:
    family: Any = Family()
    encoder = VaeEncoder(family, Decoding(8 * 8, tiled=True))
    for side in (8, 16):
        encoded(encoder, side)
    encoded(VaeEncoder(family, Decoding(8 * 8)), 16)
    assert family.asked == [False, True, False]


# --- jobs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """One of its own: it remembers what did not fit."""
    return Model("sd1", tmp_path)


def memory_for(monkeypatch: pytest.MonkeyPatch, runner: ModelRunner, pixels: int) -> None:
    """Let the VAE run out of memory for larger pictures than that, whole."""
    family: Any = runner._vae_decoder.family
    for name, pixels_of_one in (("encode", 1), ("decode", 64)):
        whole = getattr(family._vae, name)
        monkeypatch.setattr(family._vae, name, limited(whole, pixels // pixels_of_one))


def limited(run: Any, pixels: int) -> Any:
    def run_if_small(given: torch.Tensor, **options: Any) -> Any:
        if given.shape[-1] * given.shape[-2] * len(given) > pixels:
            raise torch.OutOfMemoryError("out of memory")
        return run(given, **options)

    return run_if_small


def test_what_does_not_fit_is_drawn_as_diffusers_draws_the_whole(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory_for(monkeypatch, model.runner, 0)
    model.check(
        upscaled(upscaler="lanczos"),
        upscaled(image=REFERENCE, strength=0.5, upscaler="lanczos", seed=8),
    )
    size, small = (96, 96), (64, 64)
    expected = {each % of for of in (size, small) for each in (NOT_WHOLE, NOT_ENCODED_WHOLE)}
    assert {each for each in caplog.messages if "tiles" in each} == expected


def test_a_picture_that_is_decoded_in_tiles_says_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [a_job(width=128, height=96, steps=1, seed=seed) for seed in (1, 2)] + [a_job(steps=1)]
    whole = model.together(jobs)
    memory_for(monkeypatch, model.runner, 64 * 64)
    for _ in range(2):
        *tiled, small = model.together(jobs)
        assert all(picture.warnings == (IN_TILES,) for picture in tiled)
        assert small.warnings == ()
        assert np.array_equal(small.pixels, whole[-1].pixels)
        for picture, expected in zip(tiled, whole, strict=False):
            assert np.abs(picture.pixels.astype(int) - expected.pixels.astype(int)).max() <= 1


def test_beside_steps_nothing_is_decoded_in_tiles(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tries it again alone, where it may fit whole."""
    memory_for(monkeypatch, model.runner, 0)
    monkeypatch.setattr(ModelRunner, "decodes_beside", True)
    state = model.runner.prepare(a_job(steps=1))
    model.runner.step([state])
    assert isinstance(next(model.runner.decode([state])), JobTooLargeError)
    [alone] = model.runner.decode([state], is_alone=True)
    assert alone.warnings == (IN_TILES,)


@pytest.mark.slow
@torch.no_grad()
def test_tiles_of_the_bundled_model_are_the_whole() -> None:
    """Of a part of its contact sheet. Its VAE was trained; diffusers' own tiles are 37 and 47 dB from it."""
    vae = diffusers.AutoencoderKL.from_pretrained(ROOT / "worker" / "demo" / "model" / "vae").eval()
    with Image.open(ROOT / "docs" / "contact-sheet.png") as sheet:
        crop = np.asarray(sheet.convert("RGB").crop((0, 0, 512, 384)), dtype=np.float32)
    pixels = torch.from_numpy(crop).movedim(-1, 0)[None] / 127.5 - 1.0
    whole, tiled = (found.latent_dist.mean for found in (vae.encode(pixels), tiles.encode(vae, pixels)))
    assert decibels(tiled, whole) >= 100
    assert decibels(tiles.decode(vae, whole), vae.decode(whole).sample) >= 100
