"""Quantising on a GPU, in Triton: one kernel that reads its input once. Imported where there is a GPU.

A program has all channels of some tokens. Sides of blocks are powers of two, and widths of UNets are not: so
the channels are in two blocks, the largest that fits and the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.device.fp8.e4m3 import LEAST_SCALE, MOST
from worker.device.gelu import gelu

_MOST, _LEAST_SCALE = tl.constexpr(MOST), tl.constexpr(LEAST_SCALE)
#: What is quantised: an input, its layer norm, or its gate.
PLAIN, NORM, GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _gated(y, bias, token, place, width, mask):  # type: ignore[no-untyped-def]
    """value * gelu(gate) of some channels of y + bias, (tokens, 2 width): float32."""
    at = y + token.to(tl.int64) * (2 * width) + place
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + place, mask=mask, other=0.0).to(tl.float32)
    gate += tl.load(bias + width + place, mask=mask, other=0.0).to(tl.float32)
    return value * gelu(gate, True)


@triton.jit  # type: ignore[untyped-decorator]
def _read(x, bias, token, place, width, mask, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some channels of x, (tokens, width), or of its gate, float32."""
    if KIND == GATE:
        return _gated(x, bias, token, place, width, mask)
    return tl.load(x + token.to(tl.int64) * width + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normed(exact, mean, factor, weight, bias, place, mask):  # type: ignore[no-untyped-def]
    """Some channels of a layer norm: zeros where `mask` is false."""
    own = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
    return (exact - mean) * factor * own + tl.load(bias + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def quantise_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, outliers, values, scales, tokens, width, eps,
    KIND: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`values`, (tokens, width + 2 COUNT), and `scales`, (tokens,), see `worker.device.fp8.quantising`.

    They are of x, of its gate with `bias`, or of its layer norm with `weight`, `bias` and `eps`. `outliers`:
    (COUNT,) int64. `BLOCK_REST`: 0, or for the channels from `BLOCK_C` on.
    """
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    seen = token < tokens
    place = tl.arange(0, BLOCK_C)[None, :]
    exact = _read(x, bias, token, place, width, seen, KIND)
    if BLOCK_REST > 0:
        other = BLOCK_C + tl.arange(0, BLOCK_REST)[None, :]
        inside = seen & (other < width)
        rest = _read(x, bias, token, other, width, inside, KIND)
    if COUNT > 0:
        # Read early: what follows waits for all of a token.
        index = tl.arange(0, BLOCK_K)[None, :]
        kept_mask = seen & (index < COUNT)
        chosen = tl.load(outliers + index, mask=index < COUNT, other=0)
        kept = _read(x, bias, token, chosen, width, kept_mask, KIND)
    if KIND == NORM:
        total = tl.sum(exact, axis=1, keep_dims=True)
        if BLOCK_REST > 0:
            total += tl.sum(rest, axis=1, keep_dims=True)
        mean = total / width
        away = exact - mean
        squares = tl.sum(away * away, axis=1, keep_dims=True)
        if BLOCK_REST > 0:
            away_rest = tl.where(inside, rest - mean, 0.0)
            squares += tl.sum(away_rest * away_rest, axis=1, keep_dims=True)
        factor = tl.rsqrt(squares / width + eps)
        exact = _normed(exact, mean, factor, weight, bias, place, place < width)
        if BLOCK_REST > 0:
            rest = tl.where(inside, _normed(rest, mean, factor, weight, bias, other, other < width), 0.0)
        if COUNT > 0:
            kept = _normed(kept, mean, factor, weight, bias, chosen, chosen < width)
    most = tl.max(tl.abs(exact), axis=1, keep_dims=True)
    if BLOCK_REST > 0:
        most = tl.maximum(most, tl.max(tl.abs(rest), axis=1, keep_dims=True))
    scale = tl.maximum(tl.div_rn(most, _MOST), _LEAST_SCALE)
    inverse = tl.div_rn(1.0, scale)
    row = values + token.to(tl.int64) * (width + 2 * COUNT)
    dtype = values.dtype.element_ty
    tl.store(row + place, (exact * inverse).to(dtype), mask=seen)
    if BLOCK_REST > 0:
        tl.store(row + other, (rest * inverse).to(dtype), mask=inside)
    tl.store(scales + token, scale, mask=seen)
    if COUNT > 0:
        kept = kept * inverse
        rounded = kept.to(dtype).to(tl.float32)
        tl.store(row + width + index, (kept - rounded).to(dtype), mask=kept_mask)
        tl.store(row + width + COUNT + index, rounded.to(dtype), mask=kept_mask)


#: What a kernel writes: values, and scales.
Made = tuple[torch.Tensor, torch.Tensor]


def quantise(x: torch.Tensor, outliers: torch.Tensor, made: Made) -> None:
    """Those of x, (..., channels), contiguous."""
    _run(x, x, x, outliers, made, PLAIN)


def normed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, outliers: torch.Tensor, made: Made
) -> None:
    """Those of the layer norm of x, (..., channels), contiguous."""
    _run(x, weight, bias, outliers, made, NORM, eps)


def gated(y: torch.Tensor, bias: torch.Tensor, outliers: torch.Tensor, made: Made) -> None:
    """Those of GEGLU's output: y: (..., 2 channels), contiguous; bias: (2 channels,)."""
    _run(y, bias, bias, outliers, made, GATE)


def shape_of(block: int, kind: int) -> dict[str, int]:
    """Tokens and warps of a program whose larger block has so many channels: docs/performance.md, "FP8".

    A warp has whole tokens where it can: the other ones would compute their outliers once more.
    """
    a_warp = 512 if kind == GATE.value else 1024
    return {"BLOCK_M": max(a_warp // block, 1), "num_warps": min(max(block // a_warp, 1), 4)}


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    outliers: torch.Tensor,
    made: Made,
    kind: tl.constexpr,
    eps: float = 0.0,
) -> None:
    (values, scales), count = made, len(outliers)
    width = values.shape[-1] - 2 * count
    block = 1 << (width.bit_length() - 1)
    rest = width - block
    shape = shape_of(block, kind.value)
    quantise_kernel[(triton.cdiv(scales.numel(), shape["BLOCK_M"]),)](
        x, weight, bias, outliers, values, scales, scales.numel(), width, eps,
        KIND=kind.value, COUNT=count, BLOCK_C=block,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        BLOCK_K=triton.next_power_of_2(max(count, 1)), **shape,
    )  # fmt: skip
