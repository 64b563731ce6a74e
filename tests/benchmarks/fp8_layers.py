"""What FP8 gains where, on a GPU: products and quantising alone, and transformer blocks with their kernels.

    python -m tests.benchmarks.fp8_layers

Microseconds, replayed as CUDA graphs, at the shapes of SDXL's blocks with 16 rows of 1,024 px.
"""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from tests.benchmarks.lora_kernels import microseconds
from tests.benchmarks.power import line
from worker.device import attention
from worker.device.fp8 import unet as fp8
from worker.device.fp8.layers import Fp8Linear
from worker.device.fp8.quantising import gated, normed, quantise

#: Rows, tokens, width, heads.
BLOCKS = {"1280": (16, 1024, 1280, 20), "640": (16, 4096, 640, 10)}
TEXT = 2048


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def products(name: str, tokens: int, into: int, out: int) -> None:
    """One layer: its product in fp16 and in FP8, and how long what comes before it and quantising take."""
    x = torch.randn(tokens, into, device="cuda").half()
    layer = torch.nn.Linear(into, out, bias=False).half().cuda().requires_grad_(False)
    norm = torch.nn.LayerNorm(into).half().cuda().requires_grad_(False)
    bias = torch.randn(2 * into, device="cuda").half()
    halves = torch.randn(tokens, 2 * into, device="cuda").half()
    took: dict[str, Callable[[], Any]] = {"fp16": lambda: functional.linear(x, layer.weight)}
    for outliers in (0, 16, 64):
        ours = Fp8Linear(layer, fp8._outliers([layer], norm, outliers), torch.float16)
        given = quantise(x, ours.outliers)
        took[f"{outliers} outliers"] = lambda ours=ours, given=given: ours.product(given)
        took[f"quantise {outliers}"] = lambda ours=ours: quantise(x, ours.outliers)
        took[f"norm and quantise {outliers}"] = lambda ours=ours: normed(
            x, norm.weight, norm.bias, norm.eps, ours.outliers
        )
        took[f"gate and quantise {outliers}"] = lambda ours=ours: gated(halves, bias, ours.outliers)
    took["norm"] = functools.partial(torch.compile(norm, dynamic=False), x)
    took["gate"] = functools.partial(torch.compile(_gate, dynamic=False), halves, bias)
    found: dict[str, Any] = {}
    for label, run in took.items():
        try:
            found[label] = round(microseconds(run), 1)
        except Exception as error:  # noqa: BLE001 - the rest is of use
            found[label] = f"{error!r}"[:120]
    say(layer=name, tokens=tokens, into=into, out=out, us=found)


def _gate(halves: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    value, gate = (halves + bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def blocks(name: str) -> None:
    """A transformer block, compiled: in fp16, in FP8 with and without outliers; and its kernels."""
    from diffusers.models.attention import BasicTransformerBlock

    rows, tokens, width, heads = BLOCKS[name]
    block: Any = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=TEXT)
    block = block.half().cuda().requires_grad_(False)
    for module in (block.attn1, block.attn2):
        module.set_processor(attention.Processor(attention.sdpa))
    x = torch.randn(rows, tokens, width, device="cuda").half()
    text = torch.randn(rows, 77, TEXT, device="cuda").half()
    for label, outliers in (("fp16", None), ("fp8, 0", 0), ("fp8, 16", 16), ("fp8, 64", 64)):
        own = torch.nn.ModuleDict({"block": copy.deepcopy(block)})
        if outliers is not None:
            fp8.install(own, x.device, count=outliers)
        compiled = torch.compile(own["block"], dynamic=False)

        def run(compiled: Any = compiled) -> Any:
            return compiled(x, encoder_hidden_states=text)

        with torch.no_grad():
            took = microseconds(run, 0.3)
            say(block=name, way=label, us=round(took), power=line(), kernels=kernels(run))


def kernels(run: Callable[[], Any]) -> list[str]:
    """Microseconds, calls and name of each kernel of one run, those that take long first."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    took: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            took[event.name] += event.time_range.elapsed_us() / 5
            calls[event.name] += 1
    return [f"{value:.0f} us, {calls[each] / 5:g}: {each[:110]}" for each, value in took.most_common(16)]


@torch.no_grad()
def main() -> None:
    for name, (rows, tokens, width, _) in BLOCKS.items():
        for label, into, out in (
            ("queries", width, width),
            ("feed-forward: first", width, 8 * width),
            ("feed-forward: second", 4 * width, width),
        ):
            products(f"{name} {label}", rows * tokens, into, out)
        blocks(name)


if __name__ == "__main__":
    main()
