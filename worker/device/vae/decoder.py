"""Finished latents to pixels: the VAE, the safety checker, and the copy to the CPU.

On a GPU the VAE decoder works on a stream of its own, so that the next denoising step need not wait for it,
and copies pixels into page-locked memory. All work is launched at once, and each picture is waited for when
it is asked for, so that the device always has the next ones to work on.

Pictures are decoded in chunks of a bounded number of pixels. Where a chunk does not fit in memory, later ones
have half as many pictures; where one picture does not, and nothing runs beside it, it is decoded in tiles,
and so are later ones of its size. Where a chunk fails otherwise, its pictures are decoded one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from worker.contract.errors import (
    JobTooLargeError,
    NotFiniteError,
    OutOfMemoryError,
    RenderError,
    SmallcatError,
)
from worker.device.compiling.compiler import CompiledLanes, Compiler, Piece
from worker.device.cuda_graphs import MAX_ROWS, Captured, GraphPool
from worker.device.errors import mapped
from worker.device.family import Lane, ModelFamily, lane_name
from worker.device.host_copy import HostCopy
from worker.engine.runner import Picture
from worker.model.memory_plan import CHUNK_PIXELS, PLENTY, Decoding

logger = logging.getLogger("smallcat.engine")

#: Most pixels that are decoded at once on a GPU, and on a CPU, which gains no more.
GPU_PIXELS, CPU_PIXELS = CHUNK_PIXELS, 512 * 512
NOT_WHOLE = "A picture of %d x %d does not fit in memory while it is decoded: from now on in tiles."
#: What is said of a picture that did not fit.
IN_TILES = (
    "The picture did not fit in the device's memory while it was decoded: it was decoded in tiles, which is "
    "the whole but for rounding."
)


class _How(NamedTuple):
    """How pictures are decoded."""

    #: Whether the safety checker looks at them.
    checked: bool
    #: Whether those that do not fit whole may be decoded in tiles.
    in_tiles: bool


class VaeDecoder:
    """A family's VAE and safety checker. One thread may call it while another one runs steps.

    Pictures may be waited for on a third thread.
    """

    def __init__(
        self,
        family: ModelFamily,
        device: torch.device,
        *,
        alone: bool,
        compiler: Compiler | None = None,
        decoding: Decoding = PLENTY,
    ) -> None:
        """`alone`: one picture at a time, so that its bits do not depend on the others of a chunk.

        Without a `compiler`, the VAE is neither compiled nor captured. `decoding`: what was planned.
        """
        #: The model with this VAE.
        self.family = family
        self._alone, self._decoding = alone, decoding
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lanes = CompiledLanes("VAE decoder", self._decode, compiler) if compiler else None
        self._graphs = GraphPool(compiler) if compiler else None
        #: Pictures that fit in a chunk, by lane, where more did not.
        self._caps: dict[Lane, int] = {}
        #: Lanes of which a picture does not fit in memory whole.
        self._tiled: set[Lane] = set()

    @property
    def lanes(self) -> CompiledLanes[Any] | None:
        """The compiled decoder; None: it is not compiled."""
        return self._lanes

    def pieces(self, lane: Lane, latents: torch.Tensor) -> list[Piece]:
        """What is compiled for latents of `lane` like these, (1, *shape)."""
        if self._lanes is None or self._is_tiled(lane):
            return []
        inputs = self.family.to_vae(lane, latents)

        def run(count: int) -> None:
            # A first decode captures the graph.
            list(self.pictures(lane, [latents] * count))

        return [
            Piece(
                self._lanes,
                _key(inputs, count),
                functools.partial(_example, inputs, count),
                functools.partial(run, count),
            )
            for count in sorted({1, self._most(lane)})
        ]

    def pictures(
        self, lane: Lane, latents: Sequence[torch.Tensor], *, checked: bool = True, in_tiles: bool = False
    ) -> Iterator[Picture | SmallcatError]:
        """Launch the decoding of `latents`. Returns each picture, or its error; waits when it is asked for.

        Latents are those of finished jobs of `lane`, (1, *shape) float32 each. `checked`: by the safety
        checker, where there is one. `in_tiles`: where one does not fit in memory whole.
        """
        return self._in_chunks(lane, latents, self._most(lane), _How(checked, in_tiles))

    def _in_chunks(
        self, lane: Lane, latents: Sequence[torch.Tensor], size: int, how: _How
    ) -> Iterator[Picture | SmallcatError]:
        starts = range(0, len(latents), size)
        chunks = [self._chunk(lane, latents[start : start + size], how) for start in starts]
        return itertools.chain.from_iterable(chunks)

    def _most(self, lane: Lane) -> int:
        """Most pictures of `lane` that are decoded at once."""
        width, height = self.family.size(lane)
        budget = min(self._decoding.pixels, GPU_PIXELS if self._stream else CPU_PIXELS)
        most = 1 if self._alone or self._is_tiled(lane) else max(1, budget // (width * height))
        return min(most, self._caps.get(lane, most))

    def _is_tiled(self, lane: Lane) -> bool:
        """Whether pictures of `lane` are decoded in tiles from the first on."""
        if lane in self._tiled:
            return True
        return self._decoding.is_tiled(*self.family.size(lane)) and self.family.has_tiles

    def _chunk(
        self, lane: Lane, latents: Sequence[torch.Tensor], how: _How, *, tiled: bool = False
    ) -> Iterator[Picture | SmallcatError]:
        tiled = tiled or self._is_tiled(lane)
        try:
            with mapped("decode"), torch.no_grad(), self._on_stream():
                inputs = self.family.to_vae(lane, torch.cat(list(latents)))
                if tiled:
                    return self._in_tiles(lane, inputs, how)
                return self._pictures_of(how, *self._run(inputs))
        except (OutOfMemoryError, RenderError) as error:
            if (count := len(latents)) > 1:
                size = 1
                if isinstance(error, OutOfMemoryError):
                    size = self._caps[lane] = count // 2
                    logger.warning(
                        "Decoding %d pictures at once does not fit in memory: from now on %d at once.",
                        count,
                        size,
                    )
                return self._in_chunks(lane, latents, size, how)
            if isinstance(error, RenderError):
                return iter((error,))
            width, height = self.family.size(lane)
            if how.in_tiles and not tiled and self.family.has_tiles:
                logger.warning(NOT_WHOLE, width, height)
                return self._chunk(lane, latents, how, tiled=True)
            too_large = (
                f"A picture of {width} x {height} pixels does not fit in the device's memory while it is "
                "decoded: ask for a smaller one."
            )
            return iter((JobTooLargeError(too_large),))

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """The VAE decoder's own stream, where there is one."""
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def _in_tiles(self, lane: Lane, latents: torch.Tensor, how: _How) -> Iterator[Picture | SmallcatError]:
        """Decode one picture in tiles, and remember that its size is decoded so."""
        found = self._pictures_of(how, *_pixels(self.family.decode_in_tiles(latents)))
        self._tiled.add(lane)
        self._caps[lane] = 1
        return (
            dataclasses.replace(each, warnings=(IN_TILES,)) if isinstance(each, Picture) else each
            for each in found
        )

    def _pictures_of(
        self, how: _How, pixels: torch.Tensor, is_finite: torch.Tensor, images: torch.Tensor
    ) -> Iterator[Picture | SmallcatError]:
        """The pictures that the VAE gave, once they are copied."""
        verdicts: Sequence[bool | None] = [None] * len(images)
        if how.checked and (found := self.family.check_safety(images)) is not None:
            images, verdicts = found
            # As in diffusers, a picture that the checker blacked out is not denormalised.
            for index in (index for index, is_bad in enumerate(verdicts) if is_bad):
                pixels[index] = _bytes(images[index])
        return _pictures(HostCopy(pixels, is_finite), verdicts)

    def _run(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`_decode`, compiled and replayed where possible. The next call may overwrite its outputs."""
        count, shape = len(latents), latents.shape[1:]
        if self._lanes is None or self._graphs is None:
            return self._decode(latents)
        function = self._lanes.get(_key(latents, count), lambda: _example(latents, count))
        if function is None:
            return self._decode(latents)
        # Even numbers alone: a graph for each number would take too much memory.
        padded = count if count == 1 else count + count % 2

        def make() -> tuple[Captured, Sequence[torch.Tensor]]:
            inputs = latents.new_zeros((padded, *shape))
            return lambda: function(inputs), [inputs]

        name = f"{padded} pictures of {lane_name(shape)}"
        return tuple(output[:count] for output in self._graphs.run(name, make, [latents]))

    def _decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(J, height, width, 3) uint8 pixels, (J,) whether each is finite, and the VAE's own output."""
        return _pixels(self.family.decode(latents))


def _pixels(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The VAE's output as uint8 pixels, whether each picture is finite, and the output itself."""
    # Exactly VaeImageProcessor.postprocess and numpy_to_pil; only uint8 leaves the device.
    return _bytes((images * 0.5 + 0.5).clamp(0, 1)), images.isfinite().flatten(1).all(1), images


def _bytes(images: torch.Tensor) -> torch.Tensor:
    """Values from 0 to 1, (..., channels, height, width), as uint8 pixels, (..., height, width, channels)."""
    return (images.float() * 255).round().to(torch.uint8).movedim(-3, -1)


def _pictures(copy: HostCopy, verdicts: Sequence[bool | None]) -> Iterator[Picture | SmallcatError]:
    """The pictures, once `copy` is complete: (J, height, width, 3) pixels and (J,) whether each is finite."""
    with mapped("decode"):
        pixels, is_finite = copy.wait()
    for picture, verdict, is_fine in zip(pixels.numpy(), verdicts, is_finite.tolist(), strict=True):
        if is_fine:
            yield Picture(np.ascontiguousarray(picture), None if verdict is None else bool(verdict))
        else:
            yield NotFiniteError(
                "The VAE gave values that are not finite: use a worker with SMALLCAT_DTYPE=fp32."
            )


def _key(latents: torch.Tensor, count: int) -> str:
    """What is compiled separately: each shape, and one picture alone, a special case to the compiler."""
    return f"{'one picture' if count == 1 else 'several pictures'} of {lane_name(latents.shape[1:])}"


def _example(latents: torch.Tensor, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`count` latents like these; where that is more than one, their number is dynamic.

    No more than `MAX_ROWS`: code that is compiled for 64 pictures or more is not used for fewer.
    """
    example = latents.new_zeros((min(count, MAX_ROWS), *latents.shape[1:]))
    return example, [example] if count > 1 else []
