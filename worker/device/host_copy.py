"""Copies of tensors from the device to the CPU, which the device does not wait for."""

from __future__ import annotations

import torch


class HostCopy:
    """Copies of tensors on the CPU: begun at once, waited for when they are needed.

    On a GPU the current stream copies them into page-locked memory.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copies = tensors
        if tensors[0].is_cuda:
            self._copies = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            )
            # A blocking event keeps no core busy while a thread waits.
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()

    @property
    def is_complete(self) -> bool:
        """Whether `wait` returns at once: always on a CPU, on a GPU after a first `wait`."""
        return self._event is None

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The copies, once they are complete. Raises what torch raises when the device has failed."""
        # Several threads may wait at once.
        if (event := self._event) is not None:
            event.synchronize()
            self._event = None
        return self._copies
