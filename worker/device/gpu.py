"""What the worker's GPU says of itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

#: Whether there is Triton, in which kernels are written. It comes with torch for GPUs.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def memory(device: torch.device, peaks: Mapping[str, int]) -> dict[str, int]:
    """Bytes in use and held now, and `peaks`, by name."""
    return {
        "in use": torch.cuda.memory_allocated(device),
        "held": torch.cuda.memory_reserved(device),
        **peaks,
    }


def utilisation(device: torch.device) -> float | None:
    """The share of the last moment in which the GPU worked, 0 to 1; None where nobody says."""
    try:
        return float(torch.cuda.utilization(device)) / 100
    except Exception:  # noqa: BLE001 - a figure that is not there is no fault of the worker
        return None
