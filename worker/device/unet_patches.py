"""Modules of diffusers' UNets and VAEs that compute more than is needed, with copies that compute less.

The results are the same up to rounding: sums are taken in another order. The copies are for compiled steps.
Uncompiled they are slower, because they run more and smaller kernels.

The two rows of a guided job are equal until the first layer that depends on the prompt. What comes before
that layer is computed once for each job: the first convolutions of the first block (here), and the first
self attention (`worker.device.attention.Layer.once_a_job`).
"""

from __future__ import annotations

from typing import Any

import torch


def install(pipeline: Any) -> None:
    """Put the copies into the pipeline's UNet and VAE, in place of the modules that they can stand for."""
    # Not at the top: diffusers' models must be imported after worker.device.attention.
    from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
    from diffusers.models.upsampling import Upsample2D as Original

    for model in (pipeline.unet, pipeline.vae.decoder):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Original) and _is_plain(child):
                    setattr(parent, name, Upsample2D(child))
    first = pipeline.unet.down_blocks[0]
    if shares_first_layers(pipeline.unet) and type(first) is CrossAttnDownBlock2D:
        pipeline.unet.down_blocks[0] = FirstBlock(first)


def shares_first_layers(unet: Any) -> bool:
    """Whether the first layers give a job's two rows the same values.

    SDXL adds an embedding of the prompt to that of the timestep, so that every layer depends on it.
    """
    return unet.config.addition_embed_type is None


class Upsample2D(torch.nn.Module):
    """Upsampling by 2 (nearest neighbour) and a 3 x 3 convolution, as one matrix product an input pixel.

    Of the nine weights of the convolution, those that fall on the same input pixel are added up beforehand.
    An output pixel then depends on 2 x 2 input pixels, by weights that differ for even and odd rows and
    columns: 4/9 of the products (the sub-pixel convolution of Shi et al., 2016). It is a matrix product
    because cuDNN has no fast convolution for it (measured in docs/performance.md).
    """

    #: Whether uncompiled calls take this way too, which is slower: for tests.
    always = False

    def __init__(self, original: Any) -> None:
        super().__init__()
        # For outputs that are not exactly twice as large, and for uncompiled calls.
        self.original = original
        weight, bias = original.conv.weight, original.conv.bias
        self.weight = torch.nn.Parameter(_phases(weight.float()).to(weight.dtype), requires_grad=False)
        self.bias = torch.nn.Parameter(bias.repeat(4), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """(batch, channels, height, width) to (batch, channels out, 2 height, 2 width), or `output_size`."""
        if output_size is not None or not (torch.compiler.is_compiling() or self.always):
            result: torch.Tensor = self.original(hidden_states, output_size)
            return result
        height, width = hidden_states.shape[2:]
        padded = torch.nn.functional.pad(hidden_states.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        corners = [padded[:, y : y + height + 1, x : x + width + 1] for y in (0, 1) for x in (0, 1)]
        # (batch, height + 1, width + 1, even or odd row, even or odd column, channels out)
        phases = torch.nn.functional.linear(torch.cat(corners, -1), self.weight, self.bias)
        phases = phases.unflatten(-1, (2, 2, -1))
        row = torch.arange(2 * height, device=hidden_states.device)[:, None]
        column = torch.arange(2 * width, device=hidden_states.device)
        result = phases[:, (row + 1) // 2, (column + 1) // 2, row % 2, column % 2]
        return result.permute(0, 3, 1, 2)


def _is_plain(module: Any) -> bool:
    """Whether `module` is what `Upsample2D` computes, in half precision.

    In single precision torch uses the tensor cores for convolutions, but not for matrix products.
    """
    conv = getattr(module, "conv", None)
    return bool(
        isinstance(conv, torch.nn.Conv2d)
        and (conv.kernel_size, conv.padding, conv.bias is not None) == ((3, 3), (1, 1), True)
        and conv.weight.dtype != torch.float32
        and module.norm is None
        and module.interpolate
    )


def _phases(weight: torch.Tensor) -> torch.Tensor:
    """The weights of `Upsample2D`, (4 out, 4 in), from those of the convolution, (out, in, 3, 3).

    The order of the four: even row and column, odd column, odd row, both odd. That of the corners is alike.
    """
    first, middle, last = weight.unbind(2)
    # An even row is the upper half of its pixel: above it is the pixel above, below it its own other half.
    rows = torch.stack([torch.stack([first, middle + last], 1), torch.stack([first + middle, last], 1)])
    first, middle, last = rows.unbind(-1)
    # (row, column, out, corner's row, corner's column, in)
    both = torch.stack([torch.stack([first, middle + last], 3), torch.stack([first + middle, last], 3)], 1)
    return both.flatten(0, 2).flatten(1, 3).contiguous()


class FirstBlock(torch.nn.Module):
    """The UNet's first block. Its first layers come before any that depends on the prompt."""

    has_cross_attention = True

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = original

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        cross_attention_kwargs: dict[str, torch.Tensor],
        attention_mask: None = None,
        encoder_attention_mask: None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As the original's, with `prompted` and `job_of_row` of a `worker.device.step.Batch` as keywords."""
        block = self.original
        prompted, job_of_row = cross_attention_kwargs["prompted"], cross_attention_kwargs["job_of_row"]
        outputs: tuple[torch.Tensor, ...] = ()
        for resnet, attention in zip(block.resnets, block.attentions, strict=True):
            if outputs:
                hidden_states = resnet(hidden_states, temb)
            else:
                hidden_states = resnet(hidden_states[prompted], temb[prompted])[job_of_row]
            hidden_states = attention(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
                return_dict=False,
            )[0]
            outputs += (hidden_states,)
        for downsampler in block.downsamplers or ():
            hidden_states = downsampler(hidden_states)
            outputs += (hidden_states,)
        return hidden_states, outputs
