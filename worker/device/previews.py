"""Small pictures of jobs in flight, from their latents."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worker.device.errors import mapped
from worker.device.family import ModelFamily
from worker.device.host_copy import HostCopy
from worker.device.job_state import JobState


class Previews:
    """Makes them, on any thread, while no step waits."""

    def __init__(self, family: ModelFamily, device: torch.device) -> None:
        self._family, self._device = family, device
        self._stream: Any = None

    @torch.no_grad()
    def of(self, state: JobState) -> NDArray[np.uint8] | None:
        """The latents of a job as (height, width, 3) uint8 pixels, a pixel for each of theirs.

        None: before its first step, and where no map is known for the model's VAE. On a GPU it waits for the
        steps that are launched.
        """
        if not state.step:
            return None
        latents, scale = state.scaled_latents()
        with mapped("make a preview"), self._beside():
            rgb = self._family.to_rgb(state.lane, latents * scale)
            if rgb is None:
                return None
            pixels = ((rgb * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1)
            copied: NDArray[np.uint8] = HostCopy(pixels.contiguous()).wait()[0].numpy()
            return copied

    def _beside(self) -> contextlib.AbstractContextManager[Any]:
        """On a GPU: a stream of its own, made when it is first needed, after the steps so far."""
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        return torch.cuda.stream(self._stream)
