"""Errors of torch as errors of this project: mapped here and nowhere else."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator

import torch

from worker.contract.errors import DeviceError, OutOfMemoryError, RenderError, SmallcatError, first_line

#: How often that was raised in this process.
times = Counter({"out of memory": 0})


@contextlib.contextmanager
def mapped(doing: str) -> Iterator[None]:
    """Raise `OutOfMemoryError`, `DeviceError` or `RenderError` for what torch raises while `doing`."""
    try:
        yield
    except SmallcatError:
        raise
    except Exception as error:
        # The frames of the failed forward hold its tensors for as long as somebody holds the error, and the
        # engine tries again with fewer rows while it does.
        traceback.clear_frames(error.__traceback__)
        if is_out_of_memory(error):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            times["out of memory"] += 1
            raise OutOfMemoryError(f"Out of memory while trying to {doing}: {first_line(error)}") from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(f"The device failed to {doing}: {first_line(error)}") from error
        raise RenderError(f"The model failed to {doing}: {first_line(error)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. On a GPU torch has a class for it; on a CPU only the text shows it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
