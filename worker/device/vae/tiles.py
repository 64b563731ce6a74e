"""One picture through an `AutoencoderKL` in tiles: what the whole gives, but for rounding, in less memory.

A pixel depends on two things far from it: on the pixels around it, as far as the convolutions reach, and on
the mean and the deviation that each group norm takes of the whole picture. So a tile is computed with a
margin as wide as that reach, and the norms are given the whole's mean and deviation. These are found first:
all tiles are computed as far as the first norm, then as far as the second, and so on.

Layers are taken a **level** at a time, from one change of size to the next. What is between two levels is
kept whole, before it is enlarged or after it is reduced, so that tiles need not begin at the first layer. The
smallest level, with the attention, is computed whole; its attention takes a part of the queries at a time.

It takes four to five times as long as the whole. The tiles of diffusers' `enable_tiling` have a mean, a
deviation and an attention of their own each, and differ from the whole in what is seen.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from worker.device.attention import Processor, sdpa

#: Side of a tile in pixels, at most, without its margin, where its level is largest. Pictures that are not
#: much larger have tiles of half their longer side.
SIDE = 256
#: Pairs of a query and a key that attention takes at a time: 256 MiB in fp32, with a kernel that keeps them.
PAIRS = 1 << 26


def is_known(vae: Any) -> bool:
    """Whether `vae` is built as Stable Diffusion's are, so that it can be computed in tiles."""
    # Not at the top: diffusers' models must be imported after worker.device.attention.
    from diffusers import AutoencoderKL
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D

    if type(vae) is not AutoencoderKL:
        return False
    down, up = vae.encoder.down_blocks, vae.decoder.up_blocks
    resnets = [resnet for block in (*down, *up) for resnet in block.resnets]
    norms = [resnet.norm1 for resnet in resnets] + [resnet.norm2 for resnet in resnets]
    return (
        all(type(block) is DownEncoderBlock2D for block in down)
        and all(type(block) is UpDecoderBlock2D for block in up)
        and all(type(resnet) is ResnetBlock2D and resnet.time_emb_proj is None for resnet in resnets)
        and all(type(norm) is torch.nn.GroupNorm for norm in (*norms, vae.decoder.conv_norm_out))
    )


@torch.no_grad()
def encode(vae: Any, pixels: torch.Tensor) -> Any:
    """The distribution of the latents, as the method `encode` of `vae`, a known one, returns it.

    `pixels`: (1, 3, height, width), whose sides the VAE's factor divides.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    encoder = vae.encoder
    levels: list[list[Any]] = [[encoder.conv_in]]
    for block in encoder.down_blocks:
        levels[-1] += block.resnets
        if block.downsamplers:
            levels[-1] += block.downsamplers
            levels.append([])
    *tiled, whole = levels
    hidden = pixels
    for layers in tiled:
        hidden = _in_tiles(layers, hidden, enlarged=1)
    whole += [*_middle(encoder.mid_block), encoder.conv_norm_out, encoder.conv_act, encoder.conv_out]
    moments = _run([*whole, vae.quant_conv], hidden)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The picture, (1, 3, height, width), about -1 to 1.

    `latents`: (1, channels, height, width). `vae` is a known one.
    """
    decoder = vae.decoder
    levels: list[list[Any]] = [[vae.post_quant_conv, decoder.conv_in, *_middle(decoder.mid_block)]]
    for block in decoder.up_blocks:
        levels[-1] += block.resnets
        if block.upsamplers:
            levels.append(list(block.upsamplers))
    levels[-1] += [decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
    whole, *tiled = levels
    hidden = _run(whole, latents)
    for layers in tiled:
        hidden = _in_tiles(layers, hidden, enlarged=2)
    return hidden


def _middle(block: Any) -> Iterator[Any]:
    """The layers of a `UNetMidBlock2D`."""
    first, *others = block.resnets
    yield first
    for attention, resnet in zip(block.attentions, others, strict=True):
        if attention is not None:
            yield functools.partial(Processor(_in_parts), attention)
        yield resnet


def _in_parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one part of the queries after the other: see `worker.device.attention_timing.Kernel`."""
    _, tokens, heads, _ = key.shape
    parts = query.split(max(1, PAIRS // (tokens * heads)), dim=1)
    return torch.cat([sdpa(part, key, value, scale) for part in parts], dim=1)


def _run(layers: Iterable[Any], hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` through `layers`, of which those that a VAE may lack are None."""
    from diffusers.models.resnet import ResnetBlock2D

    for layer in layers:
        if isinstance(layer, ResnetBlock2D):
            hidden = layer(hidden, None)
        elif layer is not None:
            hidden = layer(hidden)
    return hidden


# --- a level in tiles ---------------------------------------------------------------------------------------


def _in_tiles(layers: Sequence[torch.nn.Module], hidden: torch.Tensor, *, enlarged: int) -> torch.Tensor:
    """What `_run` gives. `enlarged`: how many times as large as `hidden` the level is before it ends."""
    height, width = hidden.shape[-2:]
    convolutions = [each for layer in layers for each in layer.modules() if isinstance(each, torch.nn.Conv2d)]
    margin = _even(sum(each.kernel_size[0] // 2 for each in convolutions), enlarged)
    side = min(SIDE // enlarged, _even(max(height, width), 2))
    tiles = [
        _Tile(rows, columns)
        for rows in _spans(height, side, margin)
        for columns in _spans(width, side, margin)
    ]
    norms: list[_Norm] = []
    layers = [_with_norms(layer, norms) for layer in layers]
    result: torch.Tensor | None = None
    for _ in range(len(norms) + 1):
        for tile in tiles:
            for norm in norms:
                norm.tile = tile
            try:
                output = _run(layers, tile.cut(hidden))
            except _NormReached:
                continue
            if result is None:
                sides = (side * output.shape[-1] // tile.columns.outer for side in (height, width))
                result = output.new_empty((*output.shape[:2], *sides))
            tile.paste(output, result)
        for norm in norms:
            norm.settle()
    assert result is not None  # noqa: S101 - each round but the last found what one norm needs
    return result


def _even(length: int, parts: int) -> int:
    """A part of `length` pixels, rounded up to an even number: a level that is reduced begins with one."""
    return 2 * -(-length // (2 * parts))


class _Span(NamedTuple):
    """The rows or the columns of a tile in its level's input."""

    first: int
    end: int
    #: With the margin, which ends at the picture's edge.
    outer_first: int
    outer_end: int

    @property
    def outer(self) -> int:
        """How many there are with the margin."""
        return self.outer_end - self.outer_first

    def own(self, length: int) -> slice:
        """Those without the margin, of the `length` that a layer made of all."""
        first, end = ((each - self.outer_first) * length // self.outer for each in (self.first, self.end))
        return slice(first, end)

    def place(self, length: int) -> slice:
        """Where those are in a picture of which a layer makes `length` of the tile."""
        return slice(self.first * length // self.outer, self.end * length // self.outer)


def _spans(length: int, side: int, margin: int) -> list[_Span]:
    """`length` in parts of at most `side`, an even number."""
    starts = range(0, length, side)
    ends = [min(start + side, length) for start in starts]
    return [
        _Span(start, end, max(0, start - margin), min(length, end + margin))
        for start, end in zip(starts, ends, strict=True)
    ]


class _Tile(NamedTuple):
    rows: _Span
    columns: _Span

    def cut(self, hidden: torch.Tensor) -> torch.Tensor:
        """The tile with its margin, of its level's input."""
        rows, columns = (slice(span.outer_first, span.outer_end) for span in self)
        return hidden[..., rows, columns]

    def own(self, output: torch.Tensor) -> torch.Tensor:
        """The tile without its margin, of what a layer made of it."""
        height, width = output.shape[-2:]
        return output[..., self.rows.own(height), self.columns.own(width)]

    def paste(self, output: torch.Tensor, result: torch.Tensor) -> None:
        """Put the tile without its margin in its place."""
        height, width = output.shape[-2:]
        result[..., self.rows.place(height), self.columns.place(width)] = self.own(output)


class _NormReached(Exception):  # noqa: N818 - not an error
    """Raised when a tile has come to a norm that does not know the picture's mean and deviation."""


class _Norm(torch.nn.Module):
    """A group norm by the mean and deviation of the whole picture."""

    def __init__(self, original: torch.nn.GroupNorm) -> None:
        super().__init__()
        self._original = original
        #: What is computed now.
        self.tile: _Tile | None = None
        #: Of each tile so far: pixels of a group, and each group's mean and variance.
        self._found: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        #: By which each channel is multiplied, and what is added.
        self._applied: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, channels, height, width). Raises `_NormReached` until `settle` was called with all tiles."""
        if self._applied is None:
            assert self.tile is not None  # noqa: S101 - set for each tile
            own = self.tile.own(hidden).contiguous().float()
            groups = own.view(self._original.num_groups, -1)
            variance, mean = torch.var_mean(groups, dim=1, correction=0)
            self._found.append((groups.shape[1], mean, variance))
            raise _NormReached
        factor, shift = self._applied
        # In fp32, whatever the dtype of `hidden`.
        return torch.addcmul(shift, hidden, factor).to(hidden.dtype)

    def settle(self) -> None:
        """Put the tiles' means and variances together, if there are any (Chan et al., 1979)."""
        if not self._found:
            return
        counts, means, variances = zip(*self._found, strict=True)
        self._found.clear()
        shares = torch.tensor(counts, dtype=torch.float64)[:, None].to(means[0].device) / sum(counts)
        each = torch.stack(means).double()
        mean = (shares * each).sum(0)
        variance = (shares * (torch.stack(variances).double() + (each - mean).square())).sum(0)
        norm = self._original
        deviation = (variance + norm.eps).sqrt()
        channels = norm.num_channels // norm.num_groups
        mean, deviation = (value.repeat_interleave(channels) for value in (mean, deviation))
        factor = norm.weight.double() / deviation
        shift = norm.bias.double() - mean * factor
        self._applied = factor.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)


def _with_norms(layer: torch.nn.Module, norms: list[_Norm]) -> torch.nn.Module:
    """A copy of `layer` with the same weights, whose norms are added to `norms`."""
    if isinstance(layer, torch.nn.GroupNorm):
        norms.append(_Norm(layer))
        return norms[-1]
    copied = copy.copy(layer)
    copied._modules = {name: child and _with_norms(child, norms) for name, child in layer._modules.items()}
    return copied
