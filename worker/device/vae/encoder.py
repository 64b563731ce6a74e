"""Pictures to latents: the VAE's encoder, whole or in tiles.

On a GPU it is compiled for the sizes of which several pictures have come, and captured as a CUDA graph.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from worker.contract.errors import OutOfMemoryError, first_line
from worker.device.compiling.compiler import CompiledLanes, Compiler
from worker.device.cuda_graphs import Captured, GraphPool
from worker.device.errors import mapped
from worker.device.family import ModelFamily, lane_name
from worker.model.memory_plan import PLENTY, Decoding

logger = logging.getLogger("smallcat.engine")

NOT_WHOLE = "A picture of %d x %d does not fit in memory while it is encoded: from now on in tiles."
#: Pictures of a size before the encoder is compiled for it: many workers never see one.
CALLS_BEFORE_COMPILING: Final = 8


class VaeEncoder:
    """Encodes pictures by a family's VAE, on any number of threads at the same time.

    Where one does not fit in memory whole, it is encoded in tiles, and so are later ones of its size. That
    may be beside steps, which need some of the memory: tiles are as good as the whole, and nothing waits.
    """

    def __init__(
        self, family: ModelFamily, planned: Decoding = PLENTY, *, compiler: Compiler | None = None
    ) -> None:
        """`planned`: which pictures the plan of the memory has in tiles.

        Without a `compiler`, the VAE is neither compiled nor captured.
        """
        #: The model with this VAE.
        self.family = family
        self._planned = planned
        #: (height, width) of pictures that do not fit whole.
        self._tiled: set[tuple[int, ...]] = set()
        self._compiled = _CompiledEncoder(family, compiler) if compiler else None

    @property
    def lanes(self) -> CompiledLanes[Any] | None:
        """The compiled encoder; None: it is not compiled."""
        return self._compiled.lanes if self._compiled is not None else None

    def to_latents(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A picture, (3, height, width) float32 of -1 to 1 on the CPU, as a job's scaled latents.

        (*shape) float32 on the device. What the VAE leaves to chance is drawn from `generator`, the same in
        tiles as whole. Raises `OutOfMemoryError` where tiles do not fit either, or the family has none, and
        `InvalidJobError` where the family takes no pictures.
        """
        encoded = self._encoded(pixels)
        with mapped("encode the image"):
            return self.family.drawn_latents(encoded, generator)

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        size = height, width = tuple(pixels.shape[-2:])
        if size in self._tiled or (self._planned.is_tiled(width, height) and self.family.has_tiles):
            return self._in_tiles(pixels)
        try:
            with mapped("encode the image"):
                return self._whole(self.family.to_encoder(pixels))
        except OutOfMemoryError:
            if not self.family.has_tiles:
                raise
        encoded = self._in_tiles(pixels)
        logger.warning(NOT_WHOLE, width, height)
        self._tiled.add(size)
        return encoded

    def _whole(self, pixels: torch.Tensor) -> torch.Tensor:
        # A graph keeps its memory, which a plan has to spare only where it has for the largest chunks.
        has_room = self._planned == PLENTY and pixels[0, 0].numel() <= PLENTY.pixels
        if self._compiled is not None and has_room and (encoded := self._compiled.run(pixels)) is not None:
            return encoded
        return self.family.encode_picture(pixels)

    def _in_tiles(self, pixels: torch.Tensor) -> torch.Tensor:
        with mapped("encode the image in tiles"):
            return self.family.encode_picture(self.family.to_encoder(pixels), in_tiles=True)


class _CompiledEncoder:
    """The encoder for one picture of each size, compiled and captured. Thread-safe."""

    def __init__(self, family: ModelFamily, compiler: Compiler) -> None:
        self._family = family
        self.lanes: CompiledLanes[Callable[[torch.Tensor], torch.Tensor]] = CompiledLanes(
            "VAE encoder", self._encode, compiler, calls=CALLS_BEFORE_COMPILING
        )
        self._graphs = GraphPool(compiler)
        #: Graphs are for one thread: the GPU takes one picture after the other anyway.
        self._lock = threading.Lock()
        #: What the GPU does after the last replay, which the next one waits for, on whatever stream it is.
        self._replayed: torch.cuda.Event | None = None
        self._works = True

    def run(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """As `ModelFamily.encode_picture`, on the current stream. None: it is not compiled, or fails."""
        with self._lock, torch.no_grad():
            if not self._works:
                return None
            lane = (
                f"one picture of {lane_name(pixels.shape[1:])} in {str(pixels.dtype).removeprefix('torch.')}"
            )
            function = self.lanes.get(lane, lambda: (_inputs_like(pixels), []))
            if function is None:
                return None
            try:
                return self._replay(lane, function, pixels)
            except Exception as error:  # noqa: BLE001 - the uncompiled encoder says what fails there, too
                logger.warning("The VAE encoder runs uncompiled from now on: %s", first_line(error))
                self._works = False
                return None

    def _replay(
        self, lane: str, function: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor
    ) -> torch.Tensor:
        def make() -> tuple[Captured, Sequence[torch.Tensor]]:
            inputs = _inputs_like(pixels)
            return lambda: (function(inputs),), [inputs]

        if self._replayed is not None:
            self._replayed.wait()
        (encoded,) = self._graphs.run(lane, make, [pixels])
        # A clone, because the next replay overwrites it.
        encoded = encoded.clone()
        if encoded.is_cuda:
            self._replayed = torch.cuda.Event()
            self._replayed.record()
        return encoded

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._family.encode_picture(pixels)


def _inputs_like(pixels: torch.Tensor) -> torch.Tensor:
    """Zeros of the layout that all is compiled for; pictures come in several."""
    return pixels.new_zeros(pixels.shape)
