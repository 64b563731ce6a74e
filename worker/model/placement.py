"""Where a model runs and how: device, arithmetic, safety checker, each choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
from worker.model import gpu_lock


@dataclass(frozen=True)
class Choice:
    """One thing that was chosen at start, for the log."""

    #: What was to be chosen: "device", "dtype", "attention", "max rows", "model", "safety checker", ...
    what: str
    #: What was taken.
    choice: str
    #: Why.
    reason: str


def choose_device(asked: str) -> tuple[torch.device, str]:
    """What to run on, and why. Raises `SettingsError` when a GPU is asked for and there is none."""
    if asked == "cpu":
        return torch.device("cpu"), "SMALLCAT_DEVICE asks for it"
    if not torch.cuda.is_available():
        if asked == "auto":
            return torch.device("cpu"), "torch finds no CUDA GPU"
        raise SettingsError(
            f"SMALLCAT_DEVICE is cuda, but torch {torch.__version__} finds no CUDA GPU: install a CUDA build "
            "of torch and the driver, or set SMALLCAT_DEVICE=cpu."
        )
    return torch.device("cuda"), "there is a GPU" if asked == "auto" else "SMALLCAT_DEVICE asks for it"


def take_gpu() -> tuple[torch.device, str]:
    """A GPU that no other worker has, for the life of this process, and why this one.

    Raises `SettingsError` when there is none.
    """
    index, reason = gpu_lock.take(
        torch.cuda.device_count(), lambda index: str(torch.cuda.get_device_properties(index).uuid)
    )
    # Threads start with the first GPU as theirs, and libraries ask for the present one.
    torch.cuda.set_device(index)
    return torch.device("cuda", index), reason


def choose_dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The arithmetic of the UNet, text encoders and VAE, and why. Sampler arithmetic is always fp32."""
    if asked == "auto":
        if device.type == "cuda":
            return torch.float16, "half the memory and many times the speed of fp32 on a GPU"
        return torch.float32, "the fastest on most CPUs, and exact"
    if (
        asked == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise SettingsError(
            "SMALLCAT_DTYPE is bf16, which this GPU does not have: set SMALLCAT_DTYPE=fp16 or leave it out."
        )
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return dtypes[asked], "SMALLCAT_DTYPE asks for it"


def choose_safety_checker(settings: WorkerSettings, *, ships_one: bool) -> tuple[str, str]:
    """Whether a safety checker looks at every picture, and why."""
    if not ships_one:
        return "none", "the model ships none"
    if settings.safety_checker:
        return "on", "the model ships one"
    return "off", "SMALLCAT_SAFETY_CHECKER switches it off"


def device_name(device: torch.device) -> str:
    """The device as a log shows it."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
