"""The styles of the bundled LoRAs: filters of pictures, each of which gives the same picture every time.

A LoRA learns what its filter does to the pictures of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import functional

#: Pixels a side of the squares of pixel art, and brightnesses of each of red, green and blue there. A square
#: is one place of the latents: smaller ones the UNet draws blurred.
CELL, LEVELS = 8, 5
#: Weights of red, green and blue in brightness (Rec. 601).
_BRIGHTNESS = (0.299, 0.587, 0.114)


def pixel(pictures: torch.Tensor) -> torch.Tensor:
    """Pixel art: squares of 8 px, in 125 colours."""
    small = functional.avg_pool2d((pictures + 1) / 2, CELL)
    small = (small * (LEVELS - 1)).round() / (LEVELS - 1)
    return functional.interpolate(small, scale_factor=CELL) * 2 - 1


def sketch(pictures: torch.Tensor) -> torch.Tensor:
    """A pencil on white paper: brightness divided by that of the neighbourhood, so that edges are left."""
    bright = _brightness((pictures + 1) / 2)
    lines = (bright / blurred(bright, 4).clamp(min=0.004)).clamp(max=1) ** 2.5
    return (lines * 2 - 1).expand_as(pictures)


def neon(pictures: torch.Tensor) -> torch.Tensor:
    """Edges that glow in the colour of what they surround, on black."""
    pictures = (pictures + 1) / 2
    padded = functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    edges = (1.5 * (across.square() + down.square()).sum(dim=1, keepdim=True).sqrt()).clamp(max=1)
    # The colour of the neighbourhood without its grey: at an edge it is mixed with the background's.
    hue = blurred(pictures - pictures.amin(dim=1, keepdim=True), 2) + 0.02
    light = edges * (0.15 + 0.85 * hue / hue.amax(dim=1, keepdim=True))
    return (light + 0.9 * blurred(light, 3) + 0.03).clamp(max=1) * 2 - 1


def _brightness(pictures: torch.Tensor) -> torch.Tensor:
    weights = pictures.new_tensor(_BRIGHTNESS)[:, None, None]
    return (pictures * weights).sum(dim=1, keepdim=True)


def blurred(pictures: torch.Tensor, deviation: float) -> torch.Tensor:
    """Gaussian blur, `deviation` in pixels, over each channel; the border is repeated."""
    reach = round(3 * deviation)
    places = torch.arange(-reach, reach + 1, dtype=pictures.dtype, device=pictures.device)
    weights = (-(places**2) / (2 * deviation**2)).exp()
    weights = (weights / weights.sum()).expand(pictures.shape[1], 1, 1, -1)
    padded = functional.pad(pictures, (reach,) * 4, mode="replicate")
    rows = functional.conv2d(padded, weights, groups=pictures.shape[1])
    return functional.conv2d(rows, weights.mT, groups=pictures.shape[1])


#: The filters by the name of the LoRA: pictures (n, 3, height, width; -1..1) to pictures of the same shape.
STYLES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"pixel": pixel, "sketch": sketch, "neon": neon}
)
