"""From latents to a tiny picture by one linear map: what previews show.

A VAE's latents are nearly a small picture in other colours, so each of their pixels times a matrix gives its
colour. The matrices of SD's and SDXL's VAE are those that ComfyUI has (comfy/latent_formats.py,
`latent_rgb_factors`); that of the bundled model was fitted to its own pictures by least squares
(`python -m worker.demo.training.latent_rgb`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch


@dataclass(frozen=True)
class LatentRGB:
    """A linear map from a VAE's latents, scaled as the model takes them, to RGB, about -1 to 1."""

    #: A row for each channel of the latents: red, green, blue.
    factors: Sequence[Sequence[float]]
    #: What is added: red, green, blue.
    bias: Sequence[float] = (0.0, 0.0, 0.0)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """(channels, height, width) to (3, height, width), on the same device."""
        factors = torch.tensor(self.factors).to(latents)
        bias = torch.tensor(self.bias).to(latents)
        return torch.einsum("chw,cr->rhw", latents, factors) + bias[:, None, None]


#: By the channels and the scaling factor of a VAE.
_KNOWN: Final[Mapping[tuple[int, float], LatentRGB]] = {
    # SD 1.x and 2.x.
    (4, 0.18215): LatentRGB(
        (
            (0.3512, 0.2297, 0.3227),
            (0.3250, 0.4974, 0.2350),
            (-0.2829, 0.1762, 0.2721),
            (-0.2120, -0.2616, -0.7177),
        )
    ),
    # SDXL.
    (4, 0.13025): LatentRGB(
        (
            (0.3651, 0.4232, 0.4341),
            (-0.2533, -0.0042, 0.1068),
            (0.1076, 0.1111, -0.0362),
            (-0.3165, -0.2492, -0.2188),
        ),
        (0.1084, -0.0175, -0.0011),
    ),
    # The bundled model's.
    (16, 1.1508): LatentRGB(
        (
            (-0.1685, 0.0100, -0.0228),
            (-0.0793, -0.0604, 0.0538),
            (-0.0407, -0.0785, -0.0322),
            (0.0378, -0.0664, 0.0523),
            (0.0526, 0.0405, 0.1960),
            (0.0774, 0.0650, -0.0263),
            (-0.0726, 0.0571, 0.0525),
            (0.0338, -0.0507, -0.0126),
            (0.0335, 0.1083, 0.1625),
            (0.0308, -0.2310, -0.1572),
            (0.0860, 0.0201, 0.0037),
            (0.0686, 0.0015, 0.0167),
            (0.0269, 0.0458, -0.0090),
            (0.0227, -0.0555, 0.0414),
            (0.0016, 0.0490, -0.1467),
            (-0.0400, -0.0246, 0.0240),
        ),
        (0.5575, 0.4068, 0.3303),
    ),
}


def of_vae(config: Any) -> LatentRGB | None:
    """The map for a VAE by its config; None where none is known."""
    channels, factor = getattr(config, "latent_channels", 0), getattr(config, "scaling_factor", 0.0)
    return _KNOWN.get((int(channels or 0), round(float(factor or 0.0), 5)))
