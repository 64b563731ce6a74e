"""Upsampling by two and the convolution after it, as one convolution of the smaller picture.

Of the nine weights of a 3 x 3 convolution, those that fall on the same pixel of the smaller picture may be
added up beforehand: a pixel of the larger one then takes 2 x 2 of the smaller one, by weights that depend on
whether its row and its column are even (the sub-pixel convolution of Shi et al., 2016). That is the same
result for 4/9 of the products.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import upsampling


class Upsample2D(torch.nn.Module):
    """What diffusers' module of this name computes, which it is made of."""

    def __init__(self, original: upsampling.Upsample2D) -> None:
        super().__init__()
        # For sizes that are not twice the smaller one's.
        self.original = original
        old: Any = original.conv
        phases = _phases(old.weight.float()).to(old.weight.dtype)
        self.conv = torch.nn.Conv2d(old.in_channels, 4 * old.out_channels, 2, padding=1, device="meta")
        self.conv.weight = torch.nn.Parameter(
            phases.contiguous(memory_format=torch.channels_last), requires_grad=False
        )
        self.conv.bias = torch.nn.Parameter(old.bias.repeat(4), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """(batch, channels, height, width) to (batch, channels out, 2 height, 2 width), or `output_size`."""
        if output_size is not None:
            return self.original(hidden_states, output_size)
        height, width = hidden_states.shape[2:]
        # (batch, height + 1, width + 1, even or odd row, even or odd column, channels out)
        phases = self.conv(hidden_states).permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))
        row = torch.arange(2 * height, device=hidden_states.device)[:, None]
        column = torch.arange(2 * width, device=hidden_states.device)
        result = phases[:, (row + 1) // 2, (column + 1) // 2, row % 2, column % 2]
        return result.permute(0, 3, 1, 2)


def install(*models: torch.nn.Module) -> None:
    """Put it into the place of each of diffusers' in `models` that it can stand for."""
    for model in models:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, upsampling.Upsample2D) and _is_plain(child):
                    setattr(parent, name, Upsample2D(child))


def _is_plain(module: upsampling.Upsample2D) -> bool:
    """Whether it is nothing but nearest neighbours and a 3 x 3 convolution."""
    conv: Any = getattr(module, "conv", None)
    return (
        isinstance(conv, torch.nn.Conv2d)
        and (conv.kernel_size, conv.padding, conv.bias is not None) == ((3, 3), (1, 1), True)
        and module.norm is None
        and module.interpolate
    )


def _phases(weight: torch.Tensor) -> torch.Tensor:
    """(out, in, 3, 3) to (4 out, in, 2, 2): even row and column, odd column, odd row, both odd."""
    first, middle, last = weight.unbind(2)
    # An even row is the upper half of its pixel: the row above it is of the pixel above, the others are its own.
    rows = torch.stack([torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2)])
    first, middle, last = rows.unbind(-1)
    both = torch.stack([torch.stack([first, middle + last], -1), torch.stack([first + middle, last], -1)], 1)
    return both.flatten(0, 2)
