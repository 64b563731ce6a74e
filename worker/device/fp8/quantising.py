"""Quantising to e4m3 with a scale for each token, and products of what is quantised.

    y = (q(x) @ q(w)ᵀ) * scale of the token * scale of the row

On a GPU the product is torch's `_scaled_mm`; elsewhere the same values are multiplied in float32, so that
both round alike. Quantising is a kernel there (`worker.device.fp8.kernels`), since the compiler makes several
of it, and plain torch elsewhere.

Of each layer some channels of its input are kept more precisely, those that matter most: what rounding has
left of them is quantised once more and multiplied with them in the same product, as further channels. That
is what LLM.int8 (Dettmers et al., 2022) keeps in fp16; a second product for a few channels would cost as much
as the first one, because it reads and writes all of the output once more.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import library

from worker.device.fp8.e4m3 import E4M3, LEAST_SCALE, MOST
from worker.device.gpu import HAS_TRITON


class Quantised(NamedTuple):
    """An input of linear layers."""

    #: (..., channels + 2 outliers) e4m3.
    values: torch.Tensor
    #: (..., 1) float32: of each token.
    scales: torch.Tensor


def rows_of(x: torch.Tensor | Quantised, rows: torch.Tensor) -> torch.Tensor | Quantised:
    """Some rows of an input."""
    return Quantised(x.values[rows], x.scales[rows]) if isinstance(x, Quantised) else x[rows]


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale, within e4m3's range, and the scales, (..., 1): float32 both."""
    exact = x.float()
    scales = (exact.abs().amax(-1, keepdim=True) / MOST).clamp(min=LEAST_SCALE)
    # One division for each token: they take long on a GPU.
    return exact * (1 / scales), scales


def quantise(x: torch.Tensor, outliers: torch.Tensor) -> Quantised:
    """An input of layers with these outliers, (..., channels)."""
    if x.is_cuda and HAS_TRITON:
        return Quantised(*torch.ops.smallcat.fp8_quantise(x, outliers))
    exact, scales = scaled(x)
    kept = exact[..., outliers]
    rounded = kept.to(E4M3).float()
    return Quantised(torch.cat([exact, kept - rounded, rounded], -1).to(E4M3), scales)


def normed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, outliers: torch.Tensor
) -> Quantised:
    """The layer norm of x, (..., channels), quantised."""
    if x.is_cuda and HAS_TRITON:
        return Quantised(*torch.ops.smallcat.fp8_norm(x, weight, bias, eps, outliers))
    return quantise(torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps), outliers)


def gated(y: torch.Tensor, bias: torch.Tensor | None, outliers: torch.Tensor) -> Quantised:
    """GEGLU (Shazeer, 2020), quantised: one half of y + bias times the GELU of the other.

    y: (..., 2 channels). `outliers`: of the layer that takes it.
    """
    if y.is_cuda and HAS_TRITON and bias is not None:
        return Quantised(*torch.ops.smallcat.fp8_gate(y, bias, outliers))
    value, gate = (y if bias is None else y + bias).chunk(2, dim=-1)
    return quantise(value * torch.nn.functional.gelu(gate), outliers)


def scaled_product(
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """(..., out): (values @ weightᵀ) * scales * weight_scales, for (..., in) and (out, in) in e4m3."""
    flat = values.flatten(0, -2)
    rows = scales.flatten(0, -2)
    if flat.is_cuda:
        # Sums are kept in the tensor cores, as inference does elsewhere (torchao's default).
        result = torch._scaled_mm(
            flat,
            weight.t(),
            scale_a=rows,
            scale_b=weight_scales,
            out_dtype=out_dtype,
            use_fast_accum=True,
        )
    else:
        result = ((flat.float() @ weight.float().t()) * rows * weight_scales).to(out_dtype)
    unflattened: torch.Tensor = result.unflatten(0, values.shape[:-1])
    return unflattened


# --- on a GPU -----------------------------------------------------------------------------------------------


def _kernels() -> ModuleType:
    # Not at the top: it needs Triton, which only GPUs have.
    from worker.device.fp8 import kernels

    return kernels


@library.custom_op(
    "smallcat::fp8_quantise", mutates_args=(), schema="(Tensor x, Tensor outliers) -> (Tensor, Tensor)"
)
def _quantise(x: torch.Tensor, outliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    made = _empty(x, x.shape[-1], outliers)
    _kernels().quantise(x.contiguous(), outliers, made)
    return made


@_quantise.register_fake
def _(x: torch.Tensor, outliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(x, x.shape[-1], outliers)


@library.custom_op(
    "smallcat::fp8_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, float eps, Tensor outliers) -> (Tensor, Tensor)",
)
def _norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, outliers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    made = _empty(x, x.shape[-1], outliers)
    _kernels().normed(x.contiguous(), weight, bias, eps, outliers, made)
    return made


@_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, outliers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(x, x.shape[-1], outliers)


@library.custom_op(
    "smallcat::fp8_gate",
    mutates_args=(),
    schema="(Tensor y, Tensor bias, Tensor outliers) -> (Tensor, Tensor)",
)
def _gate(y: torch.Tensor, bias: torch.Tensor, outliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    made = _empty(y, y.shape[-1] // 2, outliers)
    _kernels().gated(y.contiguous(), bias, outliers, made)
    return made


@_gate.register_fake
def _(y: torch.Tensor, bias: torch.Tensor, outliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(y, y.shape[-1] // 2, outliers)


def _empty(x: torch.Tensor, width: int, outliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel makes of (..., width)."""
    values = x.new_empty((*x.shape[:-1], width + 2 * len(outliers)), dtype=E4M3)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
