"""Chooses the device, the arithmetic and the safety checker of a model, each with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from worker.contract.errors import SettingsError
from worker.contract.gpu_share import GpuShare
from worker.contract.plain_text import counted
from worker.contract.settings import WorkerSettings
from worker.model import gpu_lock

#: The compute capability from which on a GPU has FP8.
FP8_FROM = (8, 9)


@dataclass(frozen=True)
class Choice:
    """A choice made at the start, for the log."""

    #: What is chosen: "device", "dtype", "attention", "max rows", "model", "safety checker", ...
    what: str
    #: The value chosen.
    choice: str
    #: Why.
    reason: str


def choose_device(asked: str) -> tuple[torch.device, str]:
    """The device to run on, and why. Raises `SettingsError` if `asked` is "cuda" and there is no GPU."""
    if asked == "cpu":
        return torch.device("cpu"), "set by SMALLCAT_DEVICE"
    if not torch.cuda.is_available():
        if asked == "auto":
            return torch.device("cpu"), "torch finds no CUDA GPU"
        raise SettingsError(
            f"SMALLCAT_DEVICE is cuda, but torch {torch.__version__} finds no CUDA GPU: install a CUDA build "
            "of torch and the driver, or set SMALLCAT_DEVICE=cpu."
        )
    return torch.device("cuda"), "torch finds a CUDA GPU" if asked == "auto" else "set by SMALLCAT_DEVICE"


def take_gpu(memory: str = "") -> tuple[torch.device, str]:
    """A GPU that no other worker uses, for the life of this process, and why this one.

    With SMALLCAT_GPU_MEMORY, which is `memory`, it may be shared. Raises `SettingsError` if there is none.
    """
    index, reason = gpu_lock.take(
        torch.cuda.device_count(),
        lambda index: str(torch.cuda.get_device_properties(index).uuid),
        share_of=_parts_of(GpuShare.parse(memory)) if memory else None,
    )
    # Libraries use the current GPU; by default that is the first one.
    torch.cuda.set_device(index)
    return torch.device("cuda", index), reason


def _parts_of(share: GpuShare) -> Callable[[int], int]:
    """How many of a GPU's parts a worker uses, by the GPU's index. At most all: more is refused later."""

    def parts(index: int) -> int:
        total = torch.cuda.get_device_properties(index).total_memory
        return min(gpu_lock.PARTS, max(1, math.ceil(gpu_lock.PARTS * share.of(total) / total)))

    return parts


def share_gpu(index: int) -> tuple[torch.device, str]:
    """The GPU that this process' parent has taken."""
    torch.cuda.set_device(index)
    return torch.device("cuda", index), "the worker's own"


def choose_dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The arithmetic of the UNet, text encoders and VAE, and why. Sampler arithmetic is always fp32."""
    if asked == "auto":
        if device.type == "cuda":
            return torch.float16, "half the memory of fp32, and many times faster on a GPU"
        return torch.float32, "the fastest and most exact on most CPUs"
    if (
        asked == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise SettingsError(
            "SMALLCAT_DTYPE is bf16, which this GPU does not support: set SMALLCAT_DTYPE=fp16 or unset it."
        )
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return dtypes[asked], "set by SMALLCAT_DTYPE"


def choose_precision(settings: WorkerSettings, device: torch.device, dtype: torch.dtype) -> str:
    """How linear layers are computed in FP8, for the log; empty: they are not. Raises `SettingsError`."""
    if settings.precision != "fp8":
        return ""
    if settings.exact:
        raise SettingsError(
            "SMALLCAT_PRECISION is fp8, whose products have not been shown to give the same bits in every "
            "batch, and SMALLCAT_EXACT is 1: unset one of them."
        )
    if device.type != "cuda":
        return "set by SMALLCAT_PRECISION; a CPU computes it slowly, in fp32 with the same rounding"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_FROM:
        raise SettingsError(
            f"SMALLCAT_PRECISION is fp8, and {torch.cuda.get_device_name(device)} has none: its compute "
            f"capability is {major}.{minor}, which must be {FP8_FROM[0]}.{FP8_FROM[1]} or more; unset it."
        )
    if dtype == torch.float32:
        raise SettingsError(
            "SMALLCAT_PRECISION is fp8, which goes with fp16 and bf16, and SMALLCAT_DTYPE is fp32: unset one "
            "of them."
        )
    return "set by SMALLCAT_PRECISION: linear layers of the UNet, with scales by row and by token"


def choose_safety_checker(settings: WorkerSettings, *, ships_one: bool) -> tuple[str, str]:
    """Whether a safety checker checks every picture, and why."""
    if not ships_one:
        return "none", "the model has none"
    if settings.safety_checker:
        return "on", "the model has one"
    return "off", "set by SMALLCAT_SAFETY_CHECKER"


def device_name(device: torch.device) -> str:
    """The device as it appears in the log."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({counted(torch.get_num_threads(), 'thread')})"
