"""Tensors on their way off the device, while it goes on."""

from __future__ import annotations

import torch


class Arrival:
    """Copies of tensors on the CPU: sent for at once, waited for when they are asked for.

    On a GPU they leave by the current stream, through page-locked memory.
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
            # Whoever waits keeps no core busy.
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()

    @property
    def is_there(self) -> bool:
        """Whether nobody has to wait: on a CPU, and once somebody has."""
        return self._event is None

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The copies, once they are complete. Raises what torch raises when the device has failed."""
        # Several threads may wait at once.
        if (event := self._event) is not None:
            event.synchronize()
            self._event = None
        return self._copies
