"""The kernels of LoRAs alone, on a GPU: block sizes, and the products of transformer blocks.

    python -m tests.benchmarks.lora_kernels

Every result is compared with plain torch before it is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from tests.benchmarks.power import line
from worker.device.loras import products
from worker.device.loras.job_set import FIELDS, LayerFactors

#: Rows, tokens, width, width of the text, and how many such blocks the model has.
BLOCKS = {
    "SDXL 1280": (16, 1024, 1280, 2048, 60),
    "SDXL 640": (16, 4096, 640, 2048, 10),
    "SD1 320": (32, 4096, 320, 768, 5),
    "SD1 640": (32, 1024, 640, 768, 5),
    "SD1 1280": (32, 256, 1280, 768, 5),
}
#: Milliseconds of a step without LoRAs: docs/performance.md.
STEP_MS = {"SDXL": 237.0, "SD1": 64.0}
#: Ways to launch the gate's kernel, and both products': all that differs from what `products` chooses.
GATES: list[dict[str, int]] = [
    {},
    {"TILES": 1},
    {"TILES": 2},
    {"TILES": 8},
    {"TILES": 1, "BLOCK_M": 32},
    {"TILES": 4, "BLOCK_M": 32},
    {"TILES": 4, "BLOCK_N": 32},
    {"TILES": 2, "num_warps": 8},
    {"TILES": 2, "BLOCK_N": 128, "num_warps": 8},
]
BOTH: list[dict[str, int]] = [
    {},
    {"BLOCK_N": 64},
    {"BLOCK_N": 64, "num_stages": 4},
    {"BLOCK_M": 32},
    {"BLOCK_M": 32, "BLOCK_N": 64},
    {"BLOCK_M": 128, "num_warps": 8},
]


@dataclass
class Factors:
    """Random factors of layers, the same for all shapes: (width in, width out)."""

    shapes: list[tuple[int, int]]
    jobs: int
    rank: int

    def __post_init__(self) -> None:
        self.layers: dict[tuple[int, int], LayerFactors] = {}
        table = torch.zeros(self.jobs, len(self.shapes), FIELDS, dtype=torch.int64)
        for job in range(self.jobs):
            for layer, (width, out) in enumerate(self.shapes):
                down = torch.randn(self.rank, width, device="cuda").half() / width**0.5
                up = torch.randn(self.rank, out, device="cuda").half() / self.rank**0.5
                made = self.layers[job, layer] = LayerFactors(down, up, 0.3 + job / 16)
                table[job, layer] = torch.tensor(made.entry())
        self.table = table.cuda()
        self.none = torch.zeros_like(self.table)

    def added(self, y: torch.Tensor, x: torch.Tensor, layer: int, owners: torch.Tensor) -> torch.Tensor:
        """y and its product, float32."""
        result = y.float()
        for row, job in enumerate(owners.tolist()):
            each = self.layers[job, layer]
            result[row] += each.scale * (x[row].float() @ each.down.float().T @ each.up.float())
        return result


def microseconds(run: Callable[[], Any], budget_s: float = 0.06) -> float:
    """Of one call, replayed as a CUDA graph."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    best, started_s = float("inf"), time.monotonic()
    while time.monotonic() - started_s < budget_s:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        # The least: another process may use the GPU meanwhile.
        best = min(best, start.elapsed_time(end) * 1e3 / 5)
    return best


def _gate(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    value, gate = (y + bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def _far(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()


class Case:
    """The layers of one block, and inputs of theirs."""

    def __init__(self, name: str, rank: int) -> None:
        rows, tokens, width, _, self.times = BLOCKS[name]
        half = {"device": "cuda", "dtype": torch.float16}
        self.factors = Factors([(width, width)] * 3 + [(width, 8 * width)], rows // 2, rank)
        self.owners = torch.arange(rows, device="cuda") // 2
        self.x = torch.randn(rows, tokens, width, **half)
        self.ys = [torch.randn(rows, tokens, width, **half) for _ in range(3)]
        self.wide = torch.randn(rows, tokens, 8 * width, **half)
        self.bias = torch.randn(8 * width, **half)
        wide = self.factors.added(self.wide, self.x, 3, self.owners)
        self.gated = _gate(wide, self.bias.float())
        self.added = self.factors.added(self.ys[2], self.x, 2, self.owners)

    def gate(self, table: torch.Tensor | None = None) -> torch.Tensor:
        table = self.factors.table if table is None else table
        return products.gated(self.x, self.wide, self.bias, table, self.owners, 3, 32)

    def both(self, count: int) -> torch.Tensor:
        products.add(self.x, self.ys[:count], self.factors.table, self.owners, 0, 32)
        return self.ys[-1]

    def timed(self, what: str) -> tuple[float, str]:
        """Microseconds in a step of SDXL, and what to print. Infinite where it is wrong."""
        kept = [y.clone() for y in self.ys]
        if what == "GATE":
            error, took = _far(self.gate(), self.gated), microseconds(self.gate)
            sum_us, text = took, f"{took:.0f} us"
        else:
            error = _far(self.both(3), self.added)
            three, one = (microseconds(functools.partial(self.both, count)) for count in (3, 1))
            sum_us, text = three + 3 * one, f"{three:.0f} us, of one {one:.0f} us"
        for y, before in zip(self.ys, kept, strict=True):
            y.copy_(before)
        return self.times * sum_us if error < 5e-3 else float("inf"), f"{text}; error {error:.1e}"

    def other_ways(self) -> str:
        """The gate without LoRAs, and by its own kernel after both products."""
        plain_us = microseconds(functools.partial(torch.compile(_gate, dynamic=False), self.wide, self.bias))
        none_us = microseconds(functools.partial(self.gate, self.factors.none))
        table, owners = self.factors.table, self.owners
        own_us = microseconds(lambda: products.add(self.x, [self.wide], table, owners, 3, 32))
        return (
            f"gate without LoRAs {plain_us:.0f} us, by the kernel with none {none_us:.0f} us; both products "
            f"into the gate's input {own_us:.0f} us"
        )


def tune(rank: int = 32) -> dict[str, dict[str, Any]]:
    """What is fastest over a step of SDXL: by the names in `products`."""
    ways = {"GATE": GATES, "BOTH": BOTH}
    own = {what: dict(getattr(products, what)) for what in ways}
    sums = {what: [0.0] * len(variants) for what, variants in ways.items()}
    for name in ("SDXL 1280", "SDXL 640"):
        case = Case(name, rank)
        for what, variants in ways.items():
            for number, variant in enumerate(variants):
                setattr(products, what, own[what] | variant)
                try:
                    took, text = case.timed(what)
                except Exception as problem:  # noqa: BLE001
                    took, text = float("inf"), str(problem)[:90]
                sums[what][number] += took
                print(f"  {name} {what} {variant}: {text}", flush=True)
            setattr(products, what, own[what])
        print(f"  {name}: {case.other_ways()}", flush=True)
    chosen = {}
    for what, variants in ways.items():
        best = min(range(len(variants)), key=sums[what].__getitem__)
        chosen[what] = own[what] | variants[best]
    print(f"  chosen: {chosen}; {line()}", flush=True)
    return chosen


def use(chosen: dict[str, dict[str, Any]]) -> None:
    """Launch kernels so."""
    for name, values in chosen.items():
        setattr(products, name, values)


def blocks() -> None:
    """The products of each transformer block without LoRAs, and with another one for each job."""
    compiled = torch.compile(_gate, dynamic=False)
    sums: dict[str, float] = {}
    for name, (rows, tokens, width, text_width, times) in BLOCKS.items():
        rank, room = (32, 32) if "XL" in name else (16, 32)
        half = {"device": "cuda", "dtype": torch.float16}
        # q, k, v, out; q | k, v of the text | out; both of the feed-forward
        shapes = [(width, width)] * 5 + [(text_width, width)] * 2 + [(width, width)]
        shapes += [(width, 8 * width), (4 * width, width)]
        weights = [torch.randn(out, into, **half) / into**0.5 for into, out in shapes]
        factors = Factors(shapes, rows // 2, rank)
        owners = torch.arange(rows, device="cuda") // 2
        source, text = torch.randn(rows, tokens, width, **half), torch.randn(rows, 77, text_width, **half)
        bias = torch.randn(8 * width, **half)

        def run(table: Any, args: Any = (weights, source, text, bias, owners, width, room)) -> None:
            weights, source, text, bias, owners, width, room = args

            def layers(x: Any, first: int, count: int) -> list[Any]:
                ys = [functional.linear(x, weight) for weight in weights[first : first + count]]
                if table is not None:
                    products.add(x, ys, table, owners, first, room)
                return ys

            x = functional.layer_norm(source, (width,))
            layers(layers(x, 0, 3)[2], 3, 1)
            x = functional.layer_norm(source, (width,))
            (q,) = layers(x, 4, 1)
            layers(text, 5, 2)
            layers(q, 7, 1)
            x = functional.layer_norm(source, (width,))
            y = functional.linear(x, weights[8])
            if table is None:
                gated = compiled(y, bias)
            else:
                gated = products.gated(x, y, bias, table, owners, 8, room)
            layers(gated, 9, 1)

        base, with_loras, none = (
            microseconds(lambda table=table, run=run: run(table), 0.3) / 1e3  # type: ignore[misc]
            for table in (None, factors.table, factors.none)
        )
        model = name.split()[0]
        sums[model] = sums.get(model, 0.0) + times * (with_loras - base)
        more = f"rank {rank} +{with_loras - base:.3f}, none +{none - base:.3f}"
        print(f"  {name} x{times}: {base:.3f} ms, {more}", flush=True)
    for model, added_ms in sums.items():
        share = STEP_MS[model] / (STEP_MS[model] + added_ms)
        print(f"  {model}: +{added_ms:.1f} ms a step of {STEP_MS[model]:.0f}: {share:.1%}", flush=True)


if __name__ == "__main__":
    use(tune())
    blocks()
