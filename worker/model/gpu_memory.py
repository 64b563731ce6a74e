"""How much of its GPU's memory this process may use, and what is left of it."""

from __future__ import annotations

import torch

from worker.contract.errors import SettingsError
from worker.contract.gpu_share import GpuShare

#: Bytes of the GPU that a worker's process takes and torch does not count: CUDA's context, and the code of
#: its libraries. What a worker is allowed is for both. An allowance, not measured yet.
OUTSIDE = int(0.8 * (1 << 30))
#: Those of them that are not there yet when the context is made.
LIBRARIES = OUTSIDE // 2
#: Bytes that torch may take, by the index of the GPU, where the settings say.
_limits: dict[int, int] = {}


def limit(device: torch.device, asked: str) -> str:
    """Let torch take no more of `device` than SMALLCAT_GPU_MEMORY, which is `asked`, leaves it; "": all.

    Returns what that means, for the log. Raises `SettingsError`.
    """
    if not asked:
        return ""
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = GpuShare.parse(asked).of(total)
    if allowed > total:
        raise SettingsError(
            f"SMALLCAT_GPU_MEMORY is {asked}, but the GPU has {gib(total)} GiB: lower it, or unset it."
        )
    if allowed <= OUTSIDE:
        raise SettingsError(
            f"SMALLCAT_GPU_MEMORY is {asked}, {gib(allowed)} GiB of this GPU, and CUDA with its libraries "
            f"takes {gib(OUTSIDE)} GiB: raise it."
        )
    bytes_of_torch = allowed - OUTSIDE
    torch.cuda.set_per_process_memory_fraction(bytes_of_torch / total, device)
    _limits[_index(device)] = bytes_of_torch
    return (
        f"SMALLCAT_GPU_MEMORY is {asked}: {gib(allowed)} of {gib(total)} GiB, of which CUDA and its "
        f"libraries take {gib(OUTSIDE)}"
    )


def room(device: torch.device | None = None) -> int:
    """Bytes that torch may still take of the current or another GPU, beside what it holds already."""
    index = torch.cuda.current_device() if device is None else _index(device)
    free, _ = torch.cuda.mem_get_info(index)
    if (most := _limits.get(index)) is None:
        return free
    return max(0, min(free, most - torch.cuda.memory_reserved(index)))


def all_of(device: torch.device) -> int:
    """Bytes of the GPU that this process may use at most: all, or what the settings say."""
    limited = _limits.get(_index(device))
    if limited is not None:
        return limited
    return int(torch.cuda.get_device_properties(device).total_memory)


def budget(device: torch.device) -> int:
    """Bytes that a model may take which is not loaded yet."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(_limits.get(_index(device), free), max(0, free - LIBRARIES))


def gib(size: int) -> str:
    """For people."""
    return f"{size / (1 << 30):.1f}"


def _index(device: torch.device) -> int:
    return device.index or 0
