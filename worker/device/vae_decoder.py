"""Finished latents to pixels: the VAE, the safety checker, and the way off the device.

On a GPU a decoder works on a stream of its own, so that the next denoising step need not wait for it, and
its pixels leave through page-locked memory. All is set off at once and each picture is waited for when it is
asked for, so that the device has the next ones before. Pictures are decoded in chunks of a bounded number of
pixels. Where that does not fit, half as many are decoded at once from then on; what fails in company is tried
alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import diffusers
import numpy as np
import torch

from worker.contract.errors import (
    JobTooLargeError,
    NotFiniteError,
    OutOfMemoryError,
    RenderError,
    SmallcatError,
)
from worker.device.compiler import CompiledLanes, Compiler
from worker.device.cuda_graphs import Captured, Graphs
from worker.device.errors import mapped
from worker.device.host_copy import Arrival
from worker.engine.runner import Picture

logger = logging.getLogger("smallcat.engine")

#: Pixels that are decoded at once, at most: 8 pictures of 512 x 512 on a GPU; on a CPU, where more gain
#: nothing, 1 of them.
GPU_PIXELS, CPU_PIXELS = 8 * 512 * 512, 512 * 512


class Decoder:
    """A pipeline's VAE and safety checker. One thread may call it while another one runs the UNet.

    Pictures may be waited for on a third.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        dtype: torch.dtype,
        *,
        alone: bool,
        compiler: Compiler | None,
    ) -> None:
        """`alone`: one picture at a time, so that its bits are the same whatever the company.

        Without a `compiler`, the VAE runs as it is.
        """
        self._pipeline = pipeline
        self._device, self._dtype = device, dtype
        self._alone = alone
        self._is_xl = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lanes = CompiledLanes("decoding", self._decoded, compiler) if compiler else None
        self._graphs = Graphs(compiler) if compiler else None
        #: By the shape of one picture's latents: those that fit, where more did not.
        self._caps: dict[torch.Size, int] = {}

    def compile(self, latents: torch.Tensor) -> None:
        """Compile for latents like these, (1, channels, height, width), now."""
        if self._lanes is None:
            return
        taken = self._as_vae_takes(latents)
        for count in {1, self._most(latents)}:
            if self._lanes.compile_now(_lane(taken, count), functools.partial(_example, taken, count)):
                # Captures it, which the first jobs need not wait for then.
                list(self.pictures([latents] * count))

    def pictures(self, latents: Sequence[torch.Tensor]) -> Iterator[Picture | SmallcatError]:
        """Set off the decoding of `latents`. Returns the picture of each, or its error; waits as it is asked.

        Latents are (1, channels, height, width) float32, all of one shape.
        """
        return self._in_chunks(latents, self._most(latents[0]))

    def _in_chunks(self, latents: Sequence[torch.Tensor], size: int) -> Iterator[Picture | SmallcatError]:
        chunks = [self._chunk(latents[start : start + size]) for start in range(0, len(latents), size)]
        return itertools.chain.from_iterable(chunks)

    def _most(self, latents: torch.Tensor) -> int:
        """Pictures like this one that are decoded at once, at most."""
        width, height = self._size(latents)
        budget = GPU_PIXELS if self._stream else CPU_PIXELS
        most = 1 if self._alone else max(1, budget // (width * height))
        return min(most, self._caps.get(latents.shape, most))

    def _size(self, latents: torch.Tensor) -> tuple[int, int]:
        """Width and height in pixels."""
        factor = int(self._pipeline.vae_scale_factor)
        return latents.shape[-1] * factor, latents.shape[-2] * factor

    def _chunk(self, latents: Sequence[torch.Tensor]) -> Iterator[Picture | SmallcatError]:
        try:
            with mapped("decode"), torch.no_grad(), self._beside():
                return self._together(torch.cat(list(latents)))
        except (OutOfMemoryError, RenderError) as error:
            if (count := len(latents)) > 1:
                size = 1
                if isinstance(error, OutOfMemoryError):
                    size = self._caps[latents[0].shape] = count // 2
                    logger.warning("%d pictures do not fit in one decoding: %d at once now.", count, size)
                return self._in_chunks(latents, size)
            if isinstance(error, RenderError):
                return iter((error,))
            width, height = self._size(latents[0])
            too_large = (
                f"A picture of {width} x {height} pixels does not fit in the device's memory while it is "
                "decoded: ask for a smaller one."
            )
            return iter((JobTooLargeError(too_large),))

    def _beside(self) -> contextlib.AbstractContextManager[Any]:
        """The decoder's own stream, where there is one."""
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def _together(self, latents: torch.Tensor) -> Iterator[Picture | SmallcatError]:
        pixels, is_finite, images = self._run(self._as_vae_takes(latents))
        verdicts: list[bool | None] = [None] * len(latents)
        if getattr(self._pipeline, "safety_checker", None) is not None:
            images, verdicts = self._pipeline.run_safety_checker(images, self._device, self._dtype)
            # VaeImageProcessor.postprocess does not denormalise what the checker blacked out.
            for place in (place for place, is_bad in enumerate(verdicts) if is_bad):
                pixels[place] = _bytes(images[place])
        return _pictures(Arrival(pixels, is_finite), verdicts)

    def _run(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`_decoded`, as fast as can be; what it gives may be written over by the next call."""
        count, shape = len(latents), latents.shape[1:]
        if self._lanes is None or self._graphs is None:
            return self._decoded(latents)
        function = self._lanes.get(_lane(latents, count), lambda: _example(latents, count))
        if function is None:
            return self._decoded(latents)
        # A graph for each number would be too many.
        room = count if count == 1 else count + count % 2

        def make() -> tuple[Captured, Sequence[torch.Tensor]]:
            inputs = latents.new_zeros((room, *shape))
            return lambda: function(inputs), [inputs]

        name = f"{room} pictures of {'x'.join(str(side) for side in shape)}"
        return tuple(output[:count] for output in self._graphs.run(name, make, [latents]))

    def _decoded(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(J, height, width, channels) uint8 pixels, (J,) whether each is finite, and what the VAE gave."""
        images: torch.Tensor = self._pipeline.vae.decode(latents, return_dict=False)[0]
        # Exactly VaeImageProcessor.postprocess and numpy_to_pil; only uint8 leaves the device.
        return _bytes((images * 0.5 + 0.5).clamp(0, 1)), images.isfinite().flatten(1).all(1), images

    def _as_vae_takes(self, latents: torch.Tensor) -> torch.Tensor:
        return self._unscaled(latents).to(self._pipeline.vae.dtype)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE takes them. diffusers reads mean and deviation in its SDXL call alone."""
        config = self._pipeline.vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if not self._is_xl or mean is None or deviation is None:
            return latents / float(config.scaling_factor)
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, deviation))
        return latents * deviation / float(config.scaling_factor) + mean


def _bytes(images: torch.Tensor) -> torch.Tensor:
    """Values from 0 to 1, (..., channels, height, width), as uint8 pixels, (..., height, width, channels)."""
    return (images.float() * 255).round().to(torch.uint8).movedim(-3, -1)


def _pictures(arrival: Arrival, verdicts: Sequence[bool | None]) -> Iterator[Picture | SmallcatError]:
    """The pictures, once there are their pixels, (pictures, height, width, channels), and who is finite."""
    with mapped("decode"):
        pixels, is_finite = arrival.wait()
    for picture, verdict, is_fine in zip(pixels.numpy(), verdicts, is_finite.tolist(), strict=True):
        if is_fine:
            yield Picture(np.ascontiguousarray(picture), None if verdict is None else bool(verdict))
        else:
            yield NotFiniteError(
                "The VAE gave values that are not finite: use a worker with SMALLCAT_DTYPE=fp32."
            )


def _lane(latents: torch.Tensor, count: int) -> Hashable:
    """What is compiled apart: each shape, and one picture by itself, a special case to the compiler."""
    return (tuple(latents.shape[1:]), count > 1)


def _example(latents: torch.Tensor, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`count` latents like these; where that is more than one, of no particular number."""
    example = latents.new_zeros((count, *latents.shape[1:]))
    return example, [example] if count > 1 else []
