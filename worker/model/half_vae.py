"""Lets a VAE decode in fp16 whose own values are too large for it, as SDXL's are.

A decoder is a stream that its blocks add to. All that reads the stream is a group norm, which does not see a
scale. So what writes to it is divided by a power of two, and with it the small constant of each norm that
reads it: the same function in real numbers, with a stream that is within fp16's range.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Final

import torch

#: Side in latent pixels of the trial, and how many are decoded: noise of another seed each.
_SIDE, _TRIALS = 64, 4
#: How far below fp16's largest number the trial's largest value is kept, as a power of two: pictures of real
#: jobs go further than noise does.
_MARGIN: Final = 4
#: The most that a stream is divided by, as a power of two. Beyond that, many weights are too small for fp16.
_MOST: Final = 10


def to_half(vae: Any) -> str:
    """Convert `vae`, a diffusers `AutoencoderKL` on its device, to fp16. Returns how, for the log.

    One that cannot be converted is left in fp32: its blocks are of an unknown kind, or its values too large.
    It must have its weights in fp32, or in fp16, from which they are taken as they are.
    """
    vae.to(torch.float32)
    if not _is_known(vae.decoder):
        return "fp32: its decoder has blocks of an unknown kind"
    peak = _peak(vae)
    largest = torch.finfo(torch.float16).max
    power = max(0, math.ceil(math.log2(peak / largest)) + _MARGIN) if 0 < peak < math.inf else _MOST + 1
    if power > _MOST:
        return f"fp32: its values reach {peak:.3g}"
    divide_stream(vae.decoder, 2.0**power)
    vae.to(torch.float16)
    return f"fp16: its values, which reach {peak:.3g}, are divided by {2**power}"


def divide_stream(decoder: Any, by: float) -> None:
    """Divide the stream of a diffusers `Decoder` by a power of two, in place. Its output stays as it is."""
    for layer in (decoder.conv_in, *(resnet.conv2 for resnet in _resnets(decoder)), *_outputs(decoder)):
        layer.weight.data /= by
        layer.bias.data /= by
    # What the stream itself goes through: it is divided already, the constant that is added is not.
    for layer in _through(decoder):
        if layer.bias is not None:
            layer.bias.data /= by
    for norm in _norms(decoder):
        norm.eps /= by**2


def _blocks(decoder: Any) -> list[Any]:
    return [decoder.mid_block, *decoder.up_blocks]


def _resnets(decoder: Any) -> list[Any]:
    return [resnet for block in _blocks(decoder) for resnet in block.resnets]


def _attentions(decoder: Any) -> list[Any]:
    return [
        each for block in _blocks(decoder) for each in getattr(block, "attentions", ()) if each is not None
    ]


def _outputs(decoder: Any) -> list[Any]:
    return [attention.to_out[0] for attention in _attentions(decoder)]


def _through(decoder: Any) -> list[Any]:
    shortcuts = [each.conv_shortcut for each in _resnets(decoder) if each.conv_shortcut is not None]
    return shortcuts + [up.conv for block in decoder.up_blocks for up in block.upsamplers or ()]


def _norms(decoder: Any) -> list[Any]:
    norms = [resnet.norm1 for resnet in _resnets(decoder)]
    return [*norms, *(attention.group_norm for attention in _attentions(decoder)), decoder.conv_norm_out]


def _is_known(decoder: Any) -> bool:
    """Whether all that reads the stream is a group norm, and all that is added to it was found."""
    from diffusers.models.autoencoders.vae import Decoder

    if not isinstance(decoder, Decoder):
        return False
    plain_resnets = all(
        type(each.conv2) is torch.nn.Conv2d
        and each.conv2.bias is not None
        and each.output_scale_factor == 1
        and each.upsample is None
        and each.downsample is None
        for each in _resnets(decoder)
    )
    plain_attentions = all(
        each.residual_connection and each.rescale_output_factor == 1 and each.spatial_norm is None
        for each in _attentions(decoder)
    )
    plain_norms = all(type(each) is torch.nn.GroupNorm for each in _norms(decoder))
    return plain_resnets and plain_attentions and plain_norms


@torch.no_grad()
def _peak(vae: Any) -> float:
    """The largest absolute value in the stream while noise is decoded, in fp32."""
    weight = vae.decoder.conv_in.weight
    generator = torch.Generator().manual_seed(0)
    with _watching(vae.decoder) as peaks:
        for _ in range(_TRIALS):
            noise = torch.randn((1, vae.config.latent_channels, _SIDE, _SIDE), generator=generator)
            vae.decode((noise / float(vae.config.scaling_factor)).to(weight.device), return_dict=False)
    return float(torch.stack(peaks).max())


@contextlib.contextmanager
def _watching(decoder: Any) -> Iterator[list[torch.Tensor]]:
    """The largest absolute value of each output that is the stream, while the context lasts."""
    peaks: list[torch.Tensor] = []

    def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        peaks.append(output.abs().max())

    watched = [decoder.conv_in, *_resnets(decoder), *_attentions(decoder), *_through(decoder)]
    handles = [each.register_forward_hook(note) for each in watched]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
