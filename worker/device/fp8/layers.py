"""Layers in FP8, in the place of a model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU

from worker.device.fp8.e4m3 import E4M3
from worker.device.fp8.quantising import Quantised, gated, normed, quantise, scaled, scaled_product


class Fp8Linear(torch.nn.Linear):
    """A linear layer in FP8. Those that share an input have the same outliers."""

    bias: torch.nn.Parameter | None  # type: ignore[assignment]
    #: (k,) int64: the channels that are kept more precisely.
    outliers: torch.Tensor
    #: (out, in + 2 k) e4m3.
    quantised: torch.Tensor
    #: (1, out) float32.
    scales: torch.Tensor

    def __init__(
        self, original: torch.nn.Linear, outliers: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> None:
        """`out_dtype`: what the device gives products in; None: in the layer's own."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self._dtype, self._given_in = original.weight.dtype, out_dtype
        self.register_parameter("bias", original.bias)
        self.register_buffer("outliers", outliers)
        exact, scales = scaled(original.weight.detach())
        kept = exact[:, outliers]
        rounded = kept.to(E4M3).float()
        # Beside q(x), r(x), q(x) of the outliers stand q(w), q(w), r(w): r is what rounding has left.
        self.register_buffer("quantised", torch.cat([exact, rounded, kept - rounded], 1).to(E4M3))
        self.register_buffer("scales", scales.T.contiguous())

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the product on this device."""
        return self._given_in or self._dtype

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(out, in): what the layer multiplies with, as it was but for rounding. Made at each call."""
        values = self.quantised.float()
        weight = values[:, : self.in_features].clone()
        weight[:, self.outliers] += values[:, self.in_features + len(self.outliers) :]
        return (weight * self.scales.T).to(self._dtype)

    def extra_repr(self) -> str:
        """With what compiled code depends on (`worker.device.compiling.kernel_cache.setup_name`)."""
        return f"{super().extra_repr()}, outliers={len(self.outliers)}, products in {self.out_dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As the original's; another dtype is that of the layer's output alone."""
        # As integers, which are moved to devices and not converted.
        self.quantised, self.scales = self.quantised.view(torch.uint8), self.scales.view(torch.int32)
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.quantised, self.scales = self.quantised.view(E4M3), self.scales.view(torch.float32)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return result

    def forward(self, x: torch.Tensor | Quantised) -> torch.Tensor:
        """As the original's, up to rounding. x: it may be quantised already."""
        return self.of(given_to(self, x))

    def of(self, given: Quantised) -> torch.Tensor:
        """The output for a quantised input."""
        output = self.product(given)
        return output if self.bias is None else output + self.bias

    def product(self, given: Quantised) -> torch.Tensor:
        """The output without bias."""
        return scaled_product(given.values, given.scales, self.quantised, self.scales, self.out_dtype).to(
            self._dtype
        )


class Fp8Norm(torch.nn.LayerNorm):
    """A layer norm whose output is quantised for layers in FP8, which alone take it."""

    #: (k,) int64: of these layers.
    outliers: torch.Tensor

    def __init__(self, norm: torch.nn.LayerNorm, outliers: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.elementwise_affine = True
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("outliers", outliers, persistent=False)

    def forward(self, x: torch.Tensor) -> Quantised:  # type: ignore[override]
        """As the original's, quantised."""
        return normed(x, self.weight, self.bias, self.eps, self.outliers)

    def plain(self) -> torch.nn.LayerNorm:
        """The original, with the same weights."""
        norm = torch.nn.LayerNorm(self.normalized_shape, self.eps, device="meta")
        norm.weight, norm.bias = self.weight, self.bias
        return norm


class Fp8Gate(GEGLU):  # type: ignore[misc]
    """GEGLU between two layers in FP8: its output is quantised for the second one."""

    #: (k,) int64: of the second layer.
    outliers: torch.Tensor

    def __init__(self, proj: Fp8Linear, second: Fp8Linear) -> None:
        torch.nn.Module.__init__(self)
        self.proj = proj
        self.register_buffer("outliers", second.outliers, persistent=False)

    def forward(self, x: torch.Tensor | Quantised) -> Quantised:
        """As the original's, quantised. x: it may be so already."""
        product = self.proj.product(given_to(self.proj, x))
        return gated(product, self.proj.bias, self.outliers)


def given_to(layer: Fp8Linear, x: torch.Tensor | Quantised) -> Quantised:
    """x as a layer takes it."""
    return x if isinstance(x, Quantised) else quantise(x, layer.outliers)


def products(x: torch.Tensor, layers: Sequence[torch.nn.Linear]) -> list[torch.Tensor]:
    """Outputs without bias of linear layers of one input, which is quantised once."""
    first = layers[0]
    if not isinstance(first, Fp8Linear):
        return [torch.nn.functional.linear(x, layer.weight) for layer in layers]
    given = quantise(x, first.outliers)
    return [layer.product(given) for layer in layers if isinstance(layer, Fp8Linear)]


def arguments(
    x: torch.Tensor, layers: Sequence[Any]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.dtype]:
    """The input and the weights of `Fp8Linear`s of one input, as operators take them."""
    given = quantise(x, layers[0].outliers)
    weights, scales = [each.quantised for each in layers], [each.scales for each in layers]
    return given.values, given.scales, weights, scales, layers[0].out_dtype
