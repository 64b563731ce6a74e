"""Where a layer of a UNet with LoRAs is, and what the LoRAs of the present forward do there.

On a GPU it calls `worker.device.loras.operators`, for all rows at once; elsewhere, and for what the kernels
do not do, it goes through the jobs one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from worker.device.fp8 import layers as fp8
from worker.device.loras.job_set import LayerFactors, Places, RowLoras


class Current(NamedTuple):
    """The LoRAs of the present forward."""

    loras: RowLoras
    #: (R,) int64: the job of each row.
    job_of_row: torch.Tensor
    #: (J,) int64: the job of each row where a layer is computed once for each job.
    jobs: torch.Tensor
    #: Whether the operators are used.
    by_kernel: bool


class Context:
    """Which LoRAs the present forward has. Each thread that runs one has its own, and so has the compiler."""

    def __init__(self) -> None:
        self._traced: Current | None = None
        self._local = threading.local()

    def enter(self, current: Current | None) -> None:
        """Have the forward from here on, on this thread, take these; None: it is over."""
        # The compiler follows what attributes hold while it traces, but knows no thread's own.
        if torch.compiler.is_compiling():
            self._traced = current
        else:
            self._local.current = current

    def get(self) -> Current:
        """Those of the present forward. Raises `RuntimeError` outside of one."""
        current: Current | None
        if torch.compiler.is_compiling():
            current = self._traced
        else:
            current = getattr(self._local, "current", None)
        if current is None:
            raise RuntimeError("A layer with LoRAs was run without any: it would draw another picture.")
        return current


class Site:
    """Where a layer is, and what LoRAs do there in the present forward."""

    def __init__(self, context: Context, places: Places, name: str, once: bool) -> None:
        """`once`: its rows are not the batch's rows but its jobs."""
        self._context, self._once = context, once
        self.index, self.is_common = places.index[name], name in places.common
        names = list(places.index)[self.index :]
        #: Its name, and those of the layers that follow it in a table, of which some share its input.
        self.names = tuple(names[:4])

    def here(self) -> tuple[Current, torch.Tensor] | None:
        """The present LoRAs and the job of each row; None where no job's set can change the layer."""
        current = self._context.get()
        if not self.is_common and not current.loras.is_wide:
            return None
        return current, current.jobs if self._once else current.job_of_row

    def linears(
        self, x: torch.Tensor, layers: Sequence[torch.nn.Linear], first: int = 0
    ) -> Sequence[torch.Tensor]:
        """Outputs without bias of linear layers of one input, (rows, tokens, width).

        They are those from `first` on, counted from this site's own.
        """
        found = self.here()
        if found is None:
            return fp8.products(x, layers)
        current, job_of_row = found
        loras, named = current.loras, zip(self.names[first:], layers, strict=False)
        if not current.by_kernel:
            return [
                each_job(x, _values(layer), name, loras, job_of_row, _product(layer), _linear)
                for name, layer in named
            ]
        rows = loras.table, job_of_row, loras.room, self.index + first
        outputs: list[torch.Tensor]
        if isinstance(layers[0], fp8.Fp8Linear):
            outputs = torch.ops.smallcat.lora_fp8_linears(x, *fp8.arguments(x, layers), *rows)
        else:
            outputs = torch.ops.smallcat.lora_linears(x, [layer.weight for layer in layers], *rows)
        return outputs


def each_job(
    x: torch.Tensor,
    weight: torch.Tensor,
    name: str,
    loras: RowLoras,
    job_of_row: torch.Tensor,
    layer: Any,
    factor: Any = None,
) -> torch.Tensor:
    """The output without bias of a layer, one job after the other.

    `layer`: (x, weight) to the output of W; `factor`: (x, down) to that of the first factor, by default the
    same.
    """
    output: torch.Tensor = layer(x, weight)
    for job, lora_set in enumerate(loras.sets):
        factors = lora_set.layers.get(name) if lora_set is not None else None
        if factors is not None:
            rows = (job_of_row == job).nonzero().flatten()
            output[rows] = with_factors(output[rows], x[rows], weight, factors, layer, factor or layer)
    return output


def with_factors(
    output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    factors: LayerFactors,
    layer: Any,
    factor: Any,
) -> torch.Tensor:
    """`output`, W x without bias, with what LoRAs change."""
    axis = (-1, *[1] * (x.ndim - 2)) if weight.ndim == 4 else (-1,)
    result = output if factors.after is None else output * factors.after.to(output.dtype).view(axis)
    if factors.before is not None:
        result = result + layer(x * (factors.before - 1).to(x.dtype).view(axis), weight)
    low = factor(x, factors.down)
    if weight.ndim == 4:
        product = functional.conv2d(low, factors.up.T[:, :, None, None])
    else:
        product = low @ factors.up
    return result + factors.scale * product


def _values(layer: torch.nn.Linear) -> torch.Tensor:
    """The numbers that a layer multiplies with, as it keeps them."""
    return layer.quantised if isinstance(layer, fp8.Fp8Linear) else layer.weight


def _product(layer: torch.nn.Linear) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(x, the layer's weight) to its output without bias."""
    return (lambda x, _: fp8.products(x, [layer])[0]) if isinstance(layer, fp8.Fp8Linear) else _linear


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight)
