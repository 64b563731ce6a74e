"""The pixels that a job begins with: from the bytes that the bucket's process made, to arrays."""

from __future__ import annotations

import numpy as np

from worker.engine.runner import JobInputs
from worker.storage.input_pixels import InputPixels


def arrays_of(pixels: InputPixels | None) -> JobInputs | None:
    """The same pixels, not copied; None: the job begins with none."""
    if pixels is None:
        return None
    width, height = pixels.size
    image = np.frombuffer(pixels.rgb, np.uint8).reshape(height, width, 3)
    if pixels.mask is None:
        return JobInputs(image)
    return JobInputs(image, np.frombuffer(pixels.mask, np.uint8).reshape(height, width))
