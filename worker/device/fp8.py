"""Linear layers of a UNet in FP8: e4m3, with a scale for each row of the weight and for each token.

    y = (q(x) @ q(w)ᵀ) * scale of the token * scale of the row

On a GPU the product is torch's `_scaled_mm`; elsewhere the same values are multiplied in float32, so that
both round alike. Quantising is plain torch, which the compiler fuses into what comes before it.

Of each layer some channels of its input are kept more precisely, those that matter most: what rounding has
left of them is quantised once more and multiplied with them in the same product, as further channels. That
is what LLM.int8 (Dettmers et al., 2022) keeps in fp16; a second product for a few channels would cost as much
as the first one, because it reads and writes all of the output once more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch

from worker.contract.errors import SettingsError, first_line

_E4M3 = torch.float8_e4m3fn
#: Its largest number.
_MOST: Final = 448.0
#: Scales are no smaller: a token of zeros has one, too.
_LEAST_SCALE: Final = 1e-12
#: Channels of an input that are kept more precisely. Sides of a product are multiples of 16.
OUTLIERS, _MULTIPLE = 16, 16

#: Linear layers of a UNet by what they are for: how their names end.
KINDS: dict[str, re.Pattern[str]] = {
    "self attention: queries, keys, values": re.compile(r"\.attn1\.to_[qkv]$"),
    "self attention: output": re.compile(r"\.attn1\.to_out\.0$"),
    "cross attention: queries": re.compile(r"\.attn2\.to_q$"),
    "cross attention: output": re.compile(r"\.attn2\.to_out\.0$"),
    "feed-forward: first": re.compile(r"\.ff\.net\.0\.proj$"),
    "feed-forward: second": re.compile(r"\.ff\.net\.2$"),
    "projection in": re.compile(r"\.proj_in$"),
    "projection out": re.compile(r"\.proj_out$"),
    "cross attention: keys, values": re.compile(r"\.attn2\.to_[kv]$"),
    "time and size": re.compile(r"(\.time_emb_proj|^(time|add)_embedding\.linear_[12])$"),
}
#: Those that a worker computes in FP8. The others have no part in a step's time worth the loss.
SERVED = tuple(name for name in KINDS if name not in ("cross attention: keys, values", "time and size"))


class Quantised(NamedTuple):
    """An input of linear layers."""

    #: (..., channels + 2 outliers) e4m3.
    values: torch.Tensor
    #: (..., 1) float32: of each token.
    scales: torch.Tensor


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
        exact, scales = _scaled(original.weight.detach())
        kept = exact[:, outliers]
        rounded = kept.to(_E4M3).float()
        # Beside q(x), r(x), q(x) of the outliers stand q(w), q(w), r(w): r is what rounding has left.
        self.register_buffer("quantised", torch.cat([exact, rounded, kept - rounded], 1).to(_E4M3))
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
        self.quantised, self.scales = self.quantised.view(_E4M3), self.scales.view(torch.float32)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the original's, up to rounding."""
        return self.of(quantise(x, self.outliers))

    def of(self, given: Quantised) -> torch.Tensor:
        """The output for a quantised input."""
        output = self.product(given)
        return output if self.bias is None else output + self.bias

    def product(self, given: Quantised) -> torch.Tensor:
        """The output without bias."""
        return scaled_product(given.values, given.scales, self.quantised, self.scales, self.out_dtype).to(
            self._dtype
        )


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale, within e4m3's range, and the scales, (..., 1): float32 both."""
    exact = x.float()
    scales = (exact.abs().amax(-1, keepdim=True) / _MOST).clamp(min=_LEAST_SCALE)
    return exact / scales, scales


def quantise(x: torch.Tensor, outliers: torch.Tensor) -> Quantised:
    """An input of layers with these outliers, (..., channels)."""
    exact, scales = _scaled(x)
    kept = exact[..., outliers]
    rounded = kept.to(_E4M3).float()
    return Quantised(torch.cat([exact, kept - rounded, rounded], -1).to(_E4M3), scales)


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


# --- a UNet -------------------------------------------------------------------------------------------------


def install(
    unet: torch.nn.Module, device: torch.device, kinds: Collection[str] = SERVED, count: int = OUTLIERS
) -> int:
    """Put FP8 in the place of the linear layers of these kinds. Returns how many.

    `count`: of outliers. Raises `SettingsError` where the GPU does not do it.
    """
    out_dtype = _out_dtype(device)
    made = 0
    with torch.no_grad():
        for group in _groups(unet, kinds):
            layers = [_layer(unet, name) for name in group]
            if not all(_fits(layer) for layer in layers):
                continue
            outliers = _outliers(layers, _norm_before(unet, group[0]), count)
            for name, layer in zip(group, layers, strict=True):
                parent, _, last = name.rpartition(".")
                setattr(unet.get_submodule(parent), last, Fp8Linear(layer, outliers, out_dtype))
                made += 1
    return made


def _groups(unet: torch.nn.Module, kinds: Collection[str]) -> Iterator[list[str]]:
    """Names of layers that share an input."""
    wanted = [KINDS[kind] for kind in kinds]
    found: dict[str, list[str]] = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and any(each.search(name) for each in wanted):
            parent, _, last = name.rpartition(".")
            shares = last in ("to_k", "to_v") or (last == "to_q" and ".attn1" in name)
            is_text = ".attn2" in name
            found.setdefault(f"{parent}: {'text' if is_text else 'all'}" if shares else name, []).append(name)
    yield from found.values()


def _layer(unet: torch.nn.Module, name: str) -> torch.nn.Linear:
    layer = unet.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear)  # noqa: S101 - `_groups` says so
    return layer


def _fits(layer: torch.nn.Linear) -> bool:
    return layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0


def _norm_before(unet: torch.nn.Module, name: str) -> Any:
    """The norm whose output is the input of a layer; None where something else is."""
    block = ".".join(name.split(".")[: -2 if ".attn" in name else -1])
    norms = {".attn1.to_": "norm1", ".attn2.to_q": "norm2", ".ff.net.0.": "norm3", ".proj_in": "norm"}
    wanted = next((norm for part, norm in norms.items() if part in name and ".to_out" not in name), None)
    if wanted == "norm3":
        block = name.partition(".ff.")[0]
    return getattr(unet.get_submodule(block), wanted, None) if wanted else None


def _outliers(layers: Sequence[torch.nn.Linear], norm: Any, count: int) -> torch.Tensor:
    """The channels that most of the outputs comes from: by the weights, and by what a norm gives them."""
    energy = torch.stack([layer.weight.detach().float().square().sum(0) for layer in layers]).sum(0)
    if norm is not None and getattr(norm, "weight", None) is not None:
        energy = energy * (norm.weight.float().square() + norm.bias.float().square())
    count = min(count, len(energy)) // 8 * 8
    return energy.topk(count).indices.sort().values


def _out_dtype(device: torch.device) -> torch.dtype | None:
    """What dtype the GPU gives products in, by one small product; None where there is no GPU: the layer's."""
    if device.type != "cuda":
        return None
    values = torch.zeros((_MULTIPLE, 2 * _MULTIPLE), device=device).to(_E4M3)
    ones = torch.ones((_MULTIPLE, 1), device=device)
    error: Exception | None = None
    # Not every version and GPU gives half precision by rows.
    for dtype in (torch.float16, torch.bfloat16):
        try:
            scaled_product(values, ones, values, ones.t().contiguous(), dtype)
            torch.cuda.synchronize(device)
        except (RuntimeError, ValueError, NotImplementedError) as problem:
            error = problem
        else:
            return dtype
    raise SettingsError(
        "SMALLCAT_PRECISION is fp8, but torch has no product in FP8 with scales by row for "
        f"{torch.cuda.get_device_name(device)} ({first_line(error or RuntimeError())}): unset it."
    )
