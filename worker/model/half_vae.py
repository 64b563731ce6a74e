"""Lets a VAE decode and encode in fp16 whose own values are too large for it, as SDXL's are.

A decoder is a stream that its blocks add to, and so is an encoder. All that reads the stream is a group norm,
which does not see a scale. So what writes to it is divided by a power of two, and with it the small constant
of each norm that reads it: the same function in real numbers, with a stream that is within fp16's range.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch

#: Side in latent pixels of the trial, and how much noise is decoded: of another seed each.
_SIDE, _TRIALS = 64, 4
#: Latent pixels on a side of the squares of one colour that are encoded.
_SQUARE: Final = 8
#: How far below fp16's largest number the trial's largest value is kept, as a power of two: pictures of real
#: jobs go further than those of the trial do.
_MARGIN: Final = 4
#: The most that a stream is divided by, as a power of two. Beyond that, many weights are too small for fp16.
_MOST: Final = 10


class Half(NamedTuple):
    """What became of a part of a VAE, for the log."""

    part: str
    #: fp16 or fp32.
    dtype: str
    reason: str


def to_half(vae: Any) -> list[Half]:
    """Convert `vae`, a diffusers `AutoencoderKL` on its device, to fp16: its decoder, then its encoder.

    A part that cannot be converted is left in fp32: its blocks are of an unknown kind, or its values too
    large. Weights must be in fp32, or in fp16, from which they are taken as they are.
    """
    return [decoder_to_half(vae), encoder_to_half(vae)]


def decoder_to_half(vae: Any) -> Half:
    """See `to_half`."""
    return _to_half("decoder", vae, vae.decoder, getattr(vae, "post_quant_conv", None))


def encoder_to_half(vae: Any) -> Half:
    """See `to_half`."""
    return _to_half("encoder", vae, vae.encoder, getattr(vae, "quant_conv", None))


def _to_half(name: str, vae: Any, part: Any, conv: Any) -> Half:
    """`conv`: what is beside the part, before or after it, if anything is."""
    both = torch.nn.ModuleList(each for each in (part, conv) if each is not None).to(torch.float32)
    if not _is_known(part):
        return Half(f"VAE {name}", "fp32", f"its {name} has blocks of an unknown kind")
    peak = _peak(vae, part)
    largest = torch.finfo(torch.float16).max
    power = max(0, math.ceil(math.log2(peak / largest)) + _MARGIN) if 0 < peak < math.inf else _MOST + 1
    if power > _MOST:
        return Half(f"VAE {name}", "fp32", f"its values reach {peak:.3g}")
    divide_stream(part, 2.0**power)
    both.to(torch.float16)
    return Half(f"VAE {name}", "fp16", f"its values, which reach {peak:.3g}, are divided by {2**power}")


def divide_stream(part: Any, by: float) -> None:
    """Divide the stream of a diffusers `Decoder` or `Encoder` by a power of two, in place.

    Its output stays as it is.
    """
    for layer in (part.conv_in, *(resnet.conv2 for resnet in _resnets(part)), *_outputs(part)):
        layer.weight.data /= by
        layer.bias.data /= by
    # What the stream itself goes through: it is divided already, the constant that is added is not.
    for layer in _through(part):
        if layer.bias is not None:
            layer.bias.data /= by
    for norm in _norms(part):
        norm.eps /= by**2


def _blocks(part: Any) -> list[Any]:
    return [part.mid_block, *_levels(part)]


def _levels(part: Any) -> list[Any]:
    return list(part.up_blocks if hasattr(part, "up_blocks") else part.down_blocks)


def _resnets(part: Any) -> list[Any]:
    return [resnet for block in _blocks(part) for resnet in block.resnets]


def _attentions(part: Any) -> list[Any]:
    return [each for block in _blocks(part) for each in getattr(block, "attentions", ()) if each is not None]


def _outputs(part: Any) -> list[Any]:
    return [attention.to_out[0] for attention in _attentions(part)]


def _samplers(part: Any) -> list[Any]:
    """What enlarges or reduces the stream."""
    name = "upsamplers" if hasattr(part, "up_blocks") else "downsamplers"
    return [sampler for block in _levels(part) for sampler in getattr(block, name) or ()]


def _through(part: Any) -> list[Any]:
    shortcuts = [each.conv_shortcut for each in _resnets(part) if each.conv_shortcut is not None]
    return shortcuts + [each.conv for each in _samplers(part)]


def _norms(part: Any) -> list[Any]:
    norms = [resnet.norm1 for resnet in _resnets(part)]
    return [*norms, *(attention.group_norm for attention in _attentions(part)), part.conv_norm_out]


def _is_known(part: Any) -> bool:
    """Whether all that reads the stream is a group norm, and all that is added to it was found."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.unets import unet_2d_blocks as kinds

    if not isinstance(part, Decoder | Encoder):
        return False
    plain_blocks = type(part.mid_block) is kinds.UNetMidBlock2D and all(
        type(each)
        in (
            kinds.UpDecoderBlock2D,
            kinds.AttnUpDecoderBlock2D,
            kinds.DownEncoderBlock2D,
            kinds.AttnDownEncoderBlock2D,
        )
        for each in _levels(part)
    )
    if not plain_blocks:
        return False
    plain_resnets = all(
        type(each.conv2) is torch.nn.Conv2d
        and each.conv2.bias is not None
        and each.output_scale_factor == 1
        and each.upsample is None
        and each.downsample is None
        for each in _resnets(part)
    )
    plain_attentions = all(
        each.residual_connection and each.rescale_output_factor == 1 and each.spatial_norm is None
        for each in _attentions(part)
    )
    plain_samplers = all(type(each.conv) is torch.nn.Conv2d and each.norm is None for each in _samplers(part))
    plain_norms = all(type(each) is torch.nn.GroupNorm for each in _norms(part))
    return plain_resnets and plain_attentions and plain_samplers and plain_norms


@torch.no_grad()
def _peak(vae: Any, part: Any) -> float:
    """The largest absolute value in the stream of a part in the trial, in fp32."""
    with _watching(part) as peaks:
        if part is vae.decoder:
            for latents in _noise(vae):
                vae.decode(latents, return_dict=False)
        else:
            for pixels in _pictures(vae):
                vae.encode(pixels, return_dict=False)
    return float(torch.stack(peaks).max())


def _noise(vae: Any) -> Iterator[torch.Tensor]:
    """Latents, (1, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(_TRIALS):
        noise = torch.randn((1, vae.config.latent_channels, _SIDE, _SIDE), generator=generator)
        yield (noise / float(vae.config.scaling_factor)).to(vae.decoder.conv_in.weight.device)


def _pictures(vae: Any) -> Iterator[torch.Tensor]:
    """Pictures of what goes furthest, and noise, (1, 3, height, width), -1 to 1."""
    conv = vae.encoder.conv_in
    factor, generator = 2 ** len(_samplers(vae.encoder)), torch.Generator().manual_seed(0)
    side = _SIDE * factor
    extreme = torch.randn((1, conv.in_channels, side, side), generator=generator).sign()
    squares = extreme[..., : _SIDE // _SQUARE, : _SIDE // _SQUARE]
    for pixels in (
        extreme,
        torch.nn.functional.interpolate(squares, size=(side, side)),
        torch.ones_like(extreme),
        2 * torch.rand(extreme.shape, generator=generator) - 1,
    ):
        yield pixels.to(conv.weight.device)


@contextlib.contextmanager
def _watching(part: Any) -> Iterator[list[torch.Tensor]]:
    """The largest absolute value of each output that is the stream, while the context lasts."""
    peaks: list[torch.Tensor] = []

    def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        peaks.append(output.abs().max())

    watched = [part.conv_in, *_resnets(part), *_attentions(part), *_through(part)]
    handles = [each.register_forward_hook(note) for each in watched]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
