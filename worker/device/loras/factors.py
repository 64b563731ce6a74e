"""From a LoRA's file to the factors of a job: on the device, at the job's weights, several as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from worker.contract.errors import InvalidJobError
from worker.device.loras.job_set import LayerFactors
from worker.model.beside.lora_files import LoraFile

#: Numbers between the starts of two tensors in a buffer are multiples of it: kernels read 16 bytes at once.
_ALIGNED = 128


@dataclass(frozen=True, eq=False)
class Stored:
    """The factors of one layer as a file has them, in a buffer of their file."""

    #: (rank, in), or (rank, taps, in) of a convolution.
    down: torch.Tensor
    #: (rank, out).
    up: torch.Tensor
    scale: float
    #: As in `Factors`; on the CPU.
    dora: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A LoRA's factors in one buffer, so that they come to the device in one copy."""

    #: All factors, in the model's dtype.
    buffer: torch.Tensor
    #: Where each layer's are: (start of down, its shape, start of up, its shape), scale and magnitude. First
    #: those of the UNet, then those of each text encoder.
    parts: tuple[Mapping[str, tuple[int, torch.Size, int, torch.Size, float, torch.Tensor | None]], ...]

    @classmethod
    def of(cls, file: LoraFile, dtype: torch.dtype, name: str) -> StoredFile:
        """On the CPU. Raises `InvalidJobError` for one, called `name`, that is not finite in `dtype`."""
        pieces: list[tuple[int, torch.Tensor]] = []
        size = 0

        def put(tensor: torch.Tensor) -> int:
            nonlocal size
            start = size
            pieces.append((start, tensor))
            size += -(-tensor.numel() // _ALIGNED) * _ALIGNED
            return start

        parts = []
        for factors in (file.unet, *file.text_encoders):
            part = {}
            for layer, each in factors.items():
                down, up = _by_taps(each.down), each.up.T
                part[layer] = put(down), down.shape, put(up), up.shape, each.scale, each.dora
            parts.append(part)
        buffer = _in_one(pieces, size).to(dtype)
        if size and not bool(torch.stack([buffer.amax(), buffer.amin()]).isfinite().all()):
            remedy = "" if dtype is torch.float32 else "a worker with SMALLCAT_DTYPE=fp32, or "
            raise InvalidJobError(
                f'The LoRA "{name}" has numbers that are too large for {str(dtype).removeprefix("torch.")}: '
                f"use {remedy}another LoRA."
            )
        return cls(buffer, tuple(parts))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.nbytes

    def to(self, device: torch.device) -> StoredFile:
        """The same on a device."""
        return StoredFile(self.buffer.to(device), self.parts)

    def layers(self, part: int) -> dict[str, Stored]:
        """The factors of the UNet, 0, or of a text encoder."""
        if part >= len(self.parts):
            return {}
        return {
            name: Stored(self._view(down, down_shape), self._view(up, up_shape), scale, dora)
            for name, (down, down_shape, up, up_shape, scale, dora) in self.parts[part].items()
        }

    def _view(self, start: int, shape: torch.Size) -> torch.Tensor:
        return self.buffer[start : start + shape.numel()].view(shape)


def _in_one(pieces: Sequence[tuple[int, torch.Tensor]], size: int) -> torch.Tensor:
    """A buffer of `size` numbers with each piece, flattened, where it starts. Of float32 if dtypes differ.

    By numpy, on one thread: torch would have all its threads meet for each of some thousand pieces, which
    takes seconds where other processes use the cores.
    """
    dtypes = {tensor.dtype for _, tensor in pieces}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    buffer = torch.zeros(size, dtype=integers)
    numbers = buffer.numpy()
    for start, tensor in pieces:
        values = tensor.to(dtype).view(integers).numpy()
        numbers[start : start + values.size].reshape(values.shape)[...] = values
    return buffer.view(dtype)


def _by_taps(down: torch.Tensor) -> torch.Tensor:
    """(rank, in, height, width) as (rank, taps, in); (rank, in) for a kernel of one pixel."""
    if down.ndim == 2 or down.shape[2:] == (1, 1):
        return down.flatten(1)
    return down.permute(0, 2, 3, 1).flatten(1, 2)


def weighted(stored: Stored, weight: float, own: torch.Tensor) -> LayerFactors:
    """The factors at a job's weight, for a layer whose weight is `own`.

    DoRA's magnitude is that of own + weight * scale * up @ down, as in PEFT (0.21): see `Factors`.
    """
    scale = weight * stored.scale
    if stored.dora is None:
        return LayerFactors(stored.down, stored.up, scale)
    own = own.to(stored.up.device)
    # (out, taps, in)
    whole = own.float().flatten(2).transpose(1, 2) if own.ndim == 4 else own.float()[:, None]
    product = stored.up.float().T @ stored.down.float().flatten(1)
    whole = whole + scale * product.view(whole.shape)
    magnitude = stored.dora.to(own.device)
    if magnitude.shape[0] > 1 or own.shape[0] == 1:
        share = magnitude.flatten() / whole.norm(dim=(1, 2)).clamp_min(1e-12)
        up = (stored.up.float() * share).to(stored.up.dtype)
        return LayerFactors(stored.down, up, scale, after=share)
    share = magnitude.flatten() / whole.norm(dim=(0, 1)).clamp_min(1e-12)
    down = (stored.down.float() * share).to(stored.down.dtype)
    return LayerFactors(down, stored.up, scale, before=share)


def merged(factors: Sequence[LayerFactors]) -> LayerFactors:
    """Those of several LoRAs at one layer as one, behind one another along the rank.

    What they change is added up: W + the sum of (W' - W).
    """
    if len(factors) == 1:
        return factors[0]
    # The largest scale stays outside, so that in fp16 small ones lose nothing that counts beside it.
    scale = max((each.scale for each in factors), key=abs) or 1.0
    ups = [(each.up.float() * (each.scale / scale)).to(each.up.dtype) for each in factors]
    return LayerFactors(
        torch.cat([each.down for each in factors]).contiguous(),
        torch.cat(ups).contiguous(),
        scale,
        _sum_of([each.after for each in factors]),
        _sum_of([each.before for each in factors]),
    )


def _sum_of(shares: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    there = [each for each in shares if each is not None]
    return torch.stack([each - 1 for each in there]).sum(0) + 1 if there else None


def joined(
    files: Sequence[tuple[StoredFile, float]], part: int, own: Mapping[str, torch.Tensor]
) -> dict[str, LayerFactors]:
    """What files at their weights change in a part of the model: see `StoredFile.layers`.

    `own`: the weight of each layer. Those of weight 0 change nothing.
    """
    found: dict[str, list[LayerFactors]] = {}
    for file, weight in files:
        for name, stored in file.layers(part).items() if weight else ():
            found.setdefault(name, []).append(weighted(stored, weight, own[name]))
    return {name: merged(each) for name, each in found.items()}
