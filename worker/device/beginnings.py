"""What a job begins with: noise alone, or its image as noisy latents, of which a mask keeps a part.

Draws are in the order of diffusers' pipelines (0.42: StableDiffusion(XL)Img2ImgPipeline and InpaintPipeline),
so that a seed means the same picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from worker.contract.errors import InvalidJobError, RenderError
from worker.contract.input_reference import ALPHA
from worker.contract.job import Job
from worker.contract.job_parameters import SIZE_STEP
from worker.device.family import Lane, ModelFamily
from worker.device.schedulers.schedule import Sampler, Schedule
from worker.engine.runner import JobInputs, Picture

#: What is said of a picture that is in part its job's image.
PUT_BACK = (
    "The image's own pixels are put back where the mask is black: preserve_unmasked=no leaves that out."
)
#: From which value on a pixel of a mask is drawn: diffusers' 0.5.
HALF = 128


@dataclass(frozen=True)
class Beginning:
    """What a job begins with, on the device."""

    #: (*shape) float32: the latents before its first step.
    latents: torch.Tensor
    #: What it keeps of its image, (3, *shape): see `worker.device.step.Kept`; None: nothing.
    kept: torch.Tensor | None = None
    #: Puts the image's own pixels back into the finished picture; None: nothing is put back.
    put_back: Callable[[Picture], Picture] | None = None
    #: One sentence for each thing the caller should know.
    warnings: tuple[str, ...] = ()

    def on(self, device: torch.device) -> Beginning:
        """The same with its latents on `device`."""
        return replace(self, latents=self.latents.to(device))


def check(job: Job, inputs: JobInputs | None) -> None:
    """Refuse what is not drawn here. Raises `InvalidJobError`, `RenderError`."""
    if not job.image:
        return
    if job.padding is not None:
        raise InvalidJobError(
            f"padding is {job.padding}, which no worker draws yet: leave it out, or send inpaint_full_res "
            "false in AUTOMATIC1111's API. Then the masked part is drawn within the whole image."
        )
    if inputs is None or (inputs.mask is None and job.mask):
        raise RenderError("The image that the job begins with was not read.")


def begin(
    family: ModelFamily,
    lane: Lane,
    job: Job,
    inputs: JobInputs | None,
    schedule: Schedule,
    sampler: Sampler | None,
    generator: torch.Generator,
) -> Beginning:
    """What `job` begins with, by the VAE of `family`. Draws from `generator`, on the CPU.

    `sampler`: for a schedule without weights. Raises `InvalidJobError`.
    """
    if not job.image or inputs is None:
        return Beginning(family.initial_noise(lane, generator) * schedule.noise_scale)
    share, share_of_noise = schedule.mixes[0] if sampler is None else sampler.mix(0)
    pixels = torch.from_numpy(inputs.image.astype(np.float32)).movedim(-1, 0) / 255.0
    image = family.to_latents(2.0 * pixels - 1.0, generator)
    noise = family.initial_noise(lane, generator).to(image.device)
    noisy = share * image + share_of_noise * noise
    if inputs.mask is None:
        return Beginning(noisy)
    # diffusers encodes the masked image, too, which models of 4 channels do not use: its noise is drawn.
    family.initial_noise(lane, generator)
    drawn = family.latent_mask(lane, torch.from_numpy(drawn_pixels(job, inputs.mask).astype(np.float32)))
    if not drawn.any():
        raise InvalidJobError(
            "mask is white in too few pixels, so that nothing would be drawn: make its white part larger."
        )
    latents = noise * schedule.noise_scale if job.strength == 1 else noisy
    kept = torch.stack([drawn.to(image.device), image, noise])
    if not job.preserve_unmasked:
        return Beginning(latents, kept)
    return Beginning(latents, kept, functools.partial(put_back, job, inputs), (PUT_BACK,))


def drawn_pixels(job: Job, mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """What the steps draw of a job whose mask has its own size: (height, width).

    With the mask `alpha` that is each latent of which any pixel is transparent. diffusers' rule, the value of
    one of its pixels, would keep some of these: the white behind the image is in them, and around it then.
    """
    drawn: NDArray[np.bool_] = mask >= HALF
    if job.mask != ALPHA or not job.preserve_unmasked:
        return drawn
    height, width = (side // SIZE_STEP for side in mask.shape)
    cells = drawn.reshape(height, SIZE_STEP, width, SIZE_STEP).any(axis=(1, 3))
    return cells.repeat(SIZE_STEP, axis=0).repeat(SIZE_STEP, axis=1)


def put_back(job: Job, inputs: JobInputs, picture: Picture) -> Picture:
    """The picture with the image's own pixels where the mask is black, and both mixed at its edge.

    With the mask `alpha` the image lies on the picture, as its alpha channel says. One that the safety
    checker blacked out stays black.
    """
    assert inputs.mask is not None  # noqa: S101 - `begin` puts nothing back without one
    if picture.nsfw:
        return picture
    image = inputs.image.astype(np.float32)
    share = inputs.mask.astype(np.float32)[..., None] / 255.0
    if job.mask == ALPHA:
        # The image lies on white (`JobInputs.image`), which the drawn pixels take the place of.
        image += share * (picture.pixels.astype(np.float32) - 255.0)
    else:
        share = np.minimum(share, _blurred(inputs.mask, job.mask_blur))
        image += share * (picture.pixels.astype(np.float32) - image)
    return Picture(np.rint(image.clip(0, 255)).astype(np.uint8), picture.nsfw)


def _blurred(mask: NDArray[np.uint8], sigma: int) -> NDArray[np.float32]:
    """A mask with its edge blurred, (height, width, 1), 0 to 1."""
    blurred = Image.fromarray(mask).filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(blurred, dtype=np.float32)[..., None] / 255.0
