"""What a pass of a job begins with: noise alone, or an image as noisy latents, of which a mask keeps a part.

Draws are in the order of diffusers' pipelines (0.42: StableDiffusion(XL)Img2ImgPipeline and InpaintPipeline),
so that a seed means the same picture. A model that was made for inpainting sees the mask and the masked image
in each forward instead: then all jobs are those of the inpainting pipelines, one without a mask as with one
that is all white.

A second pass is a job of its own that begins with what the first one gave, made larger: it draws as an
image-to-image job of its size and of the same seed does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from worker.contract.errors import InvalidJobError, RenderError
from worker.contract.input_image import HALF
from worker.contract.input_reference import ALPHA
from worker.contract.job import Job
from worker.contract.job_parameters import SIZE_STEP
from worker.device.family import Lane, ModelFamily
from worker.device.schedulers.schedule import Sampler, Schedule
from worker.device.vae.encoder import VaeEncoder
from worker.engine.runner import FirstPass, JobInputs, Picture

#: What is said where a model made for inpainting draws anew all of an image.
NOT_SEEN = (
    "The image gives its size alone: strength is 1, without a mask, and this model was made for inpainting."
)


@dataclass(frozen=True)
class Beginning:
    """What a job begins with, on the device."""

    #: (*shape) float32: the latents before its first step.
    latents: torch.Tensor
    #: What it keeps of its image, (3, *shape): see `worker.device.step.Kept`; None: nothing.
    kept: torch.Tensor | None = None
    #: What the model takes of mask and image in each forward, by name, (1, ...) each: `ModelFamily.seen`.
    seen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    #: One sentence for each thing the caller should know.
    warnings: tuple[str, ...] = ()

    def on(self, device: torch.device) -> Beginning:
        """The same with its latents on `device`."""
        return replace(self, latents=self.latents.to(device))


@dataclass(frozen=True)
class FirstLatents:
    """What a first pass gave, where its latents are made larger."""

    lane: Lane
    #: (*shape) float32.
    latents: torch.Tensor


def pass_of(job: Job, inputs: JobInputs | FirstPass | None) -> Job:
    """The pass that begins with `inputs`, as a job with a size and steps of its own. `job` is resolved."""
    if not isinstance(inputs, FirstPass) or (second := job.second_pass) is None:
        return job
    of_pass = {"width": second.width, "height": second.height, "steps": second.steps}
    return job.model_copy(update={**of_pass, "strength": second.strength, "image": "", "upscale": 1.0})


def check(job: Job, inputs: JobInputs | FirstPass | None) -> None:
    """Refuse to draw without what the job begins with. Raises `RenderError`."""
    if not job.image:
        return
    assert not isinstance(inputs, FirstPass)  # noqa: S101 - `pass_of` leaves a second pass no image
    if inputs is None or (inputs.mask is None and job.mask):
        raise RenderError("The image that the job begins with was not read.")


def begin(
    encoder: VaeEncoder,
    lane: Lane,
    job: Job,
    inputs: JobInputs | FirstPass | None,
    schedule: Schedule,
    sampler: Sampler | None,
    generator: torch.Generator,
) -> Beginning:
    """What `job`, which is of one pass, begins with, by the family and the VAE of `encoder`.

    Draws from `generator`, on the CPU. `sampler`: for a schedule without weights. Raises `InvalidJobError`,
    and as `VaeEncoder`.
    """
    family = encoder.family
    if isinstance(inputs, FirstPass):
        larger = _larger(encoder, lane, inputs.result, generator)
        noise = family.initial_noise(lane, generator).to(larger.device)
        seen = _seen(encoder, lane, job, None, generator)
        return Beginning(_noisy(larger, noise, schedule, sampler), seen=seen)
    if inputs is None or not job.image:
        latents = family.initial_noise(lane, generator) * schedule.noise_scale
        return Beginning(latents, seen=_seen(encoder, lane, job, None, generator))
    is_all_noise = job.strength == 1 and (inputs.mask is not None or family.sees_masks)
    image = None
    # What diffusers does not use, it does not encode.
    if not (is_all_noise and family.sees_masks):
        image = encoder.to_latents(_pixels(inputs.image), generator)
    noise = family.initial_noise(lane, generator)
    latents = noise * schedule.noise_scale
    if image is not None:
        noise = noise.to(image.device)
        latents = latents if is_all_noise else _noisy(image, noise, schedule, sampler)
    seen = _seen(encoder, lane, job, inputs, generator)
    if inputs.mask is None:
        return Beginning(latents, seen=seen, warnings=(NOT_SEEN,) if image is None else ())
    kept = None
    if image is not None and not family.sees_masks:
        # diffusers encodes the masked image, too, which models of 4 channels do not use: its noise is drawn.
        if family.draws_to_encode:
            family.initial_noise(lane, generator)
        kept = torch.stack([_drawn(family, lane, job, inputs.mask).to(image.device), image, noise])
    return Beginning(latents, kept, seen)


def _noisy(
    image: torch.Tensor, noise: torch.Tensor, schedule: Schedule, sampler: Sampler | None
) -> torch.Tensor:
    """Latents of an image with as much noise as the first step expects."""
    share, share_of_noise = schedule.mixes[0] if sampler is None else sampler.mix(0)
    return share * image + share_of_noise * noise


def _seen(
    encoder: VaeEncoder, lane: Lane, job: Job, inputs: JobInputs | None, generator: torch.Generator
) -> Mapping[str, torch.Tensor]:
    """What the model sees of mask and image in each forward; nothing unless it was made for inpainting.

    Without a mask all is masked, and the image is grey, as AUTOMATIC1111 1.10 has it (modules/processing.py,
    `txt2img_image_conditioning`): diffusers' masked image for a mask that is all white.
    """
    family = encoder.family
    if not family.sees_masks:
        return {}
    if inputs is None or inputs.mask is None:
        width, height = family.size(lane)
        drawn, masked = family.latent_mask(lane, torch.ones(height, width)), torch.zeros(3, height, width)
    else:
        drawn = _drawn(family, lane, job, inputs.mask)
        masked = _pixels(inputs.image) * torch.from_numpy(~drawn_pixels(job, inputs.mask))
    latents = encoder.to_latents(masked, generator)
    return family.seen(drawn.to(latents.device), latents)


def _larger(
    encoder: VaeEncoder, lane: Lane, first: FirstLatents | Picture, generator: torch.Generator
) -> torch.Tensor:
    """What a first pass gave as latents of `lane`."""
    if isinstance(first, FirstLatents):
        return encoder.family.larger_latents(first.latents, first.lane, lane)
    resized = Image.fromarray(first.pixels).resize(encoder.family.size(lane), Image.Resampling.LANCZOS)
    return encoder.to_latents(_pixels(np.asarray(resized)), generator)


def _pixels(image: NDArray[np.uint8]) -> torch.Tensor:
    """An image, (height, width, 3) RGB, as (3, height, width), -1 to 1."""
    pixels = torch.from_numpy(image.astype(np.float32)).movedim(-1, 0) / 255.0
    return 2.0 * pixels - 1.0


def _drawn(family: ModelFamily, lane: Lane, job: Job, mask: NDArray[np.uint8]) -> torch.Tensor:
    """The mask of the latents, (*shape). Raises `InvalidJobError` where it is white nowhere."""
    drawn = family.latent_mask(lane, torch.from_numpy(drawn_pixels(job, mask).astype(np.float32)))
    if not drawn.any():
        which, remedy = "white in too few pixels", "make its white part larger"
        if job.mask == ALPHA:
            which, remedy = "alpha, and the image is transparent in too few pixels", "give a mask"
        raise InvalidJobError(f"mask is {which}, so that nothing would be drawn: {remedy}.")
    return drawn


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
