"""Layers with LoRAs as operators of torch, which the compiler does not trace into.

Each takes the addresses of the jobs' factors, `table`, and the job of each of its rows, `job_of_row`; see
`worker.device.loras.job_set`. `room` has the length of the largest rank. Outputs are without the layer's
bias, unless said. The kernels are launched by `worker.device.loras.products`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import library

from worker.device.fp8.quantising import scaled_product
from worker.device.gpu import HAS_TRITON

_ROWS = "Tensor table, Tensor job_of_row, Tensor room, int layer"
#: A quantised input and the layers that take it: see `worker.device.fp8.layers.arguments`.
_FP8 = "Tensor values, Tensor scales, Tensor[] weights, Tensor[] weight_scales, ScalarType out_dtype"


def are_there(device_type: str) -> bool:
    """Whether the operators work on such a device: on a GPU with Triton."""
    return device_type == "cuda" and HAS_TRITON


def _products() -> ModuleType:
    # Not at the top: it needs Triton, which only GPUs have.
    from worker.device.loras import products

    return products


@library.custom_op(
    "smallcat::lora_linears", mutates_args=(), schema=f"(Tensor x, Tensor[] weights, {_ROWS}) -> Tensor[]"
)
def linears(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    room: torch.Tensor,
    layer: int,
) -> list[torch.Tensor]:
    """Up to three linear layers of one input, (rows, tokens, width), the first one `layer` in the table."""
    x = x.contiguous()
    outputs = [torch.nn.functional.linear(x, weight) for weight in weights]
    _products().add(x, outputs, table, job_of_row, layer, len(room))
    return outputs


@linears.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    *_: object,
) -> list[torch.Tensor]:
    return [x.new_empty((*x.shape[:-1], len(weight))) for weight in weights]


@library.custom_op(
    "smallcat::lora_gate",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor bias, {_ROWS}) -> Tensor",
)
def gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    room: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    """GEGLU: a linear layer with its bias, and one half of its output times the GELU of the other."""
    x = x.contiguous()
    output = torch.nn.functional.linear(x, weight)
    gated: torch.Tensor = _products().gated(x, output, bias, table, job_of_row, layer, len(room))
    return gated


@gate.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    *_: object,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], len(weight) // 2))


@library.custom_op(
    "smallcat::lora_fp8_linears", mutates_args=(), schema=f"(Tensor x, {_FP8}, {_ROWS}) -> Tensor[]"
)
def fp8_linears(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: list[torch.Tensor],
    weight_scales: list[torch.Tensor],
    out_dtype: torch.dtype,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    room: torch.Tensor,
    layer: int,
) -> list[torch.Tensor]:
    """`linears`, of layers in FP8. x: their input, from which `values` and `scales` are."""
    x = x.contiguous()
    outputs = [
        scaled_product(values, scales, *each, out_dtype).to(x.dtype)
        for each in zip(weights, weight_scales, strict=True)
    ]
    _products().add(x, outputs, table, job_of_row, layer, len(room))
    return outputs


@fp8_linears.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: list[torch.Tensor],
    *_: object,
) -> list[torch.Tensor]:
    return [x.new_empty((*x.shape[:-1], len(weight))) for weight in weights]


@library.custom_op(
    "smallcat::lora_fp8_gate", mutates_args=(), schema=f"(Tensor x, {_FP8}, Tensor bias, {_ROWS}) -> Tensor"
)
def fp8_gate(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: list[torch.Tensor],
    weight_scales: list[torch.Tensor],
    out_dtype: torch.dtype,
    bias: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    room: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    """`gate`, of one layer in FP8. x: its input, from which `values` and `scales` are."""
    x = x.contiguous()
    output = scaled_product(values, scales, weights[0], weight_scales[0], out_dtype).to(x.dtype)
    gated: torch.Tensor = _products().gated(x, output, bias, table, job_of_row, layer, len(room))
    return gated


@fp8_gate.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: list[torch.Tensor],
    *_: object,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], len(weights[0]) // 2))


@library.custom_op(
    "smallcat::lora_conv",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, {_ROWS}, int stride, int padding) -> Tensor",
)
def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    room: torch.Tensor,
    layer: int,
    stride: int,
    padding: int,
) -> torch.Tensor:
    """A convolution, channels last: (rows, channels, height, width)."""
    x = x.contiguous(memory_format=torch.channels_last)
    output = torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)
    output = output.contiguous(memory_format=torch.channels_last)
    size = weight.shape[2], weight.shape[3]
    _products().add_convolved(
        x, output, table, job_of_row, layer, len(room), kernel=size, stride=stride, padding=padding, scale=1
    )
    return output


@conv.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    room: torch.Tensor,
    layer: int,
    stride: int,
    padding: int,
) -> torch.Tensor:
    output = torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)
    return torch.empty_like(output, memory_format=torch.channels_last)


@library.custom_op(
    "smallcat::lora_upsampler", mutates_args=(), schema=f"(Tensor y, Tensor x, {_ROWS}) -> Tensor"
)
def upsampler(
    y: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    room: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    """y, the output of an upsampler by 2 with a convolution of 3 x 3 over x, with what LoRAs add to it."""
    output = y.clone(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    _products().add_convolved(
        x, output, table, job_of_row, layer, len(room), kernel=(3, 3), stride=1, padding=1, scale=2
    )
    return output


@upsampler.register_fake
def _(
    y: torch.Tensor,
    *_: object,
) -> torch.Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)
