"""A UNet whose linear layers are in FP8, a scale for each row of the weight and for each token."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock

from worker.contract.errors import SettingsError, first_line
from worker.device.fp8.e4m3 import E4M3
from worker.device.fp8.layers import Fp8Gate, Fp8Linear, Fp8Norm
from worker.device.fp8.quantising import scaled_product

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
    for module in unet.modules():
        if (net := getattr(module, "net", None)) is not None and _is_gate_between(net):
            # Nothing is dropped where nothing is trained; what is quantised does not go through it.
            net[0], net[1] = Fp8Gate(net[0].proj, net[2]), torch.nn.Identity()
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock) and block.norm_type == "layer_norm":
            _quantise_norms(block)
    return made


def _quantise_norms(block: Any) -> None:
    """Put FP8 in the place of those of a block's norms that only layers in FP8 read."""
    if block.pos_embed is not None or block.only_cross_attention:
        return
    own, text, gate = block.attn1, block.attn2, block.ff.net[0]
    readers = {
        "norm1": [own.to_q, own.to_k, own.to_v],
        "norm2": [text.to_q] if text is not None else [],
        "norm3": [gate.proj] if isinstance(gate, Fp8Gate) else [],
    }
    for name, layers in readers.items():
        norm = getattr(block, name)
        is_plain = type(norm) is torch.nn.LayerNorm and norm.bias is not None
        if layers and is_plain and all(isinstance(each, Fp8Linear) for each in layers):
            setattr(block, name, Fp8Norm(norm, layers[0].outliers))


def _is_gate_between(net: Any) -> bool:
    """Whether a feed-forward's layers are a gate between two layers in FP8: diffusers' `FeedForward`."""
    return (
        isinstance(net, torch.nn.ModuleList)
        and len(net) == 3
        and isinstance(net[0], GEGLU)
        and isinstance(net[0].proj, Fp8Linear)
        and isinstance(net[2], Fp8Linear)
    )


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
    values = torch.zeros((_MULTIPLE, 2 * _MULTIPLE), device=device).to(E4M3)
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
