"""Quantising on a GPU, in Triton: one kernel that reads its input once. Imported where there is a GPU.

A program has all channels of some tokens. Sides of blocks are powers of two: what is beyond the channels is
masked, which costs no memory traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.device.fp8.e4m3 import E4M3, LEAST_SCALE, MOST

#: Numbers of an input that a program has, at least.
_NUMBERS = 4096

_MOST, _LEAST_SCALE = tl.constexpr(MOST), tl.constexpr(LEAST_SCALE)


@triton.jit
def _gated(y, bias, token, place, width, mask):  # type: ignore[no-untyped-def]
    """value * gelu(gate) of some channels of y + bias, (tokens, 2 width): float32."""
    at = y + token.to(tl.int64) * (2 * width) + place
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + place, mask=mask, other=0.0).to(tl.float32)
    gate += tl.load(bias + width + place, mask=mask, other=0.0).to(tl.float32)
    return value * (gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)))


@triton.jit  # type: ignore[untyped-decorator]
def _exact(x, bias, token, place, width, mask, IS_GATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some channels of what is quantised, float32: of x, (tokens, width), or of its gate."""
    if IS_GATE:
        return _gated(x, bias, token, place, width, mask)
    return tl.load(x + token.to(tl.int64) * width + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def quantise_kernel(  # type: ignore[no-untyped-def]
    x, bias, outliers, values, scales, tokens, width,
    IS_GATE: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`values`, (tokens, width + 2 COUNT), and `scales`, (tokens,), see `worker.device.fp8.quantising`.

    `outliers`: (COUNT,) int64.
    """
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    place = tl.arange(0, BLOCK_C)[None, :]
    seen = token < tokens
    mask = seen & (place < width)
    exact = _exact(x, bias, token, place, width, mask, IS_GATE)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(exact), axis=1, keep_dims=True), _MOST), _LEAST_SCALE)
    row = values + token.to(tl.int64) * (width + 2 * COUNT)
    dtype = values.dtype.element_ty
    tl.store(row + place, tl.div_rn(exact, scale).to(dtype), mask=mask)
    tl.store(scales + token, scale, mask=seen)
    if COUNT > 0:
        index = tl.arange(0, BLOCK_K)[None, :]
        mask = seen & (index < COUNT)
        chosen = tl.load(outliers + index, mask=index < COUNT, other=0)
        kept = tl.div_rn(_exact(x, bias, token, chosen, width, mask, IS_GATE), scale)
        rounded = kept.to(dtype).to(tl.float32)
        tl.store(row + width + index, (kept - rounded).to(dtype), mask=mask)
        tl.store(row + width + COUNT + index, rounded.to(dtype), mask=mask)


def quantise(x: torch.Tensor, outliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of x, (..., channels), contiguous."""
    return _run(x, x, outliers, x.shape[-1], is_gate=False)


def gated(y: torch.Tensor, bias: torch.Tensor, outliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of GEGLU's output: y: (..., 2 channels), contiguous; bias: (2 channels,)."""
    return _run(y, bias, outliers, y.shape[-1] // 2, is_gate=True)


def _run(
    x: torch.Tensor, bias: torch.Tensor, outliers: torch.Tensor, width: int, *, is_gate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    count = len(outliers)
    values = torch.empty((*x.shape[:-1], width + 2 * count), dtype=E4M3, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    tokens = scales.numel()
    block = triton.next_power_of_2(width)
    block_m = max(1, _NUMBERS // block)
    quantise_kernel[(triton.cdiv(tokens, block_m),)](
        x, bias, outliers, values, scales, tokens, width,
        IS_GATE=is_gate, COUNT=count, BLOCK_M=block_m, BLOCK_C=block,
        BLOCK_K=triton.next_power_of_2(max(count, 1)), num_warps=8 if is_gate or block > _NUMBERS else 4,
    )  # fmt: skip
    return values, scales
