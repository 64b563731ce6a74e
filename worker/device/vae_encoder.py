"""Pictures to latents: the VAE's encoder, whole or in tiles."""

from __future__ import annotations

import logging

import torch

from worker.contract.errors import OutOfMemoryError
from worker.device.errors import mapped
from worker.device.family import ModelFamily
from worker.model.memory_plan import PLENTY, Decoding

logger = logging.getLogger("smallcat.engine")

NOT_WHOLE = "A picture of %d x %d does not fit in memory while it is encoded: from now on in tiles."


class VaeEncoder:
    """Encodes pictures by a family's VAE, on any number of threads at the same time.

    Where one does not fit in memory whole, it is encoded in tiles, and so are later ones of its size. That
    may be beside steps, which need some of the memory: tiles are as good as the whole, and nothing waits.
    """

    def __init__(self, family: ModelFamily, planned: Decoding = PLENTY) -> None:
        """`planned`: which pictures the plan of the memory has in tiles."""
        #: The model with this VAE.
        self.family = family
        self._planned = planned
        #: (height, width) of pictures that do not fit whole.
        self._tiled: set[tuple[int, ...]] = set()

    def to_latents(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """As the family's, with the same draws from `generator` in tiles as whole.

        Raises `OutOfMemoryError` where tiles do not fit either, or the family has none.
        """
        size = height, width = tuple(pixels.shape[-2:])
        if size in self._tiled or (self._planned.is_tiled(width, height) and self.family.has_tiles):
            return self._in_tiles(pixels, generator)
        before = generator.get_state()
        try:
            with mapped("encode the image"):
                return self.family.to_latents(pixels, generator)
        except OutOfMemoryError:
            if not self.family.has_tiles:
                raise
        generator.set_state(before)
        latents = self._in_tiles(pixels, generator)
        logger.warning(NOT_WHOLE, width, height)
        self._tiled.add(size)
        return latents

    def _in_tiles(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with mapped("encode the image in tiles"):
            return self.family.to_latents(pixels, generator, in_tiles=True)
