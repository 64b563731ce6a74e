"""The kernels of `worker.device.loras.kernels`, launched: which of them, with which block sizes.

What is chosen here was measured on an H200 in fp16, at the shapes of SD 1.x and SDXL: docs/performance.md,
"LoRAs". This module is imported where there is a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton

from worker.device.loras import kernels
from worker.device.loras.kernels import BLOCK_RANK

#: Tokens from which on one kernel does both products of small ranks. With fewer, such as a text's, it has too
#: few programs to fill a GPU.
MANY_TOKENS = 256
#: Tokens from which on the first product of three layers takes larger blocks.
MOST_TOKENS = 2048
#: Bytes of shared memory of a multiprocessor that those blocks need.
SHARED_BYTES = 128 << 10
#: How the gate's kernel is launched.
GATE: dict[str, Any] = {"TILES": 1, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
#: And both products' at once.
BOTH: dict[str, Any] = {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}


def add(
    x: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    layer: int,
    most_rank: int,
) -> None:
    """Add LoRAs to the outputs of up to three layers of one input x, in place.

    x: (rows, tokens, width), contiguous; outputs: (rows, tokens, width) each, without bias.
    `layer`: the place of the first one in the table. `most_rank`: no rank is larger.
    """
    rows, tokens, width = x.shape
    if most_rank > BLOCK_RANK or tokens < MANY_TOKENS:
        low = low_of(x, table, job_of_row, layer, len(outputs), most_rank)
        add_up(outputs, low, table, job_of_row, layer)
        return
    first, second, third = (*outputs, outputs[0], outputs[0])[:3]
    chosen = BOTH | _fewer_stages(x)
    kernels.both_kernel[(rows * triton.cdiv(tokens, chosen["BLOCK_M"]),)](
        x, first, second, third, table, job_of_row, tokens, width, first.shape[2], table.shape[1], layer,
        STREAMS=len(outputs), BLOCK_R=BLOCK_RANK, **chosen,
    )  # fmt: skip


def add_convolved(
    x: torch.Tensor,
    output: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    layer: int,
    most_rank: int,
    *,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    scale: int,
) -> None:
    """Add LoRAs to the output of a convolution, in place.

    Both are (rows, channels, height, width), channels last. `scale`: how often each pixel of x is repeated
    both ways first.
    """
    low = conv_low_of(
        x, table, job_of_row, layer, most_rank, kernel=kernel, stride=stride, padding=padding, scale=scale
    )
    add_up([output.permute(0, 2, 3, 1).flatten(1, 2)], low, table, job_of_row, layer)


def gated(
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    layer: int,
    most_rank: int,
) -> torch.Tensor:
    """GEGLU of y, (rows, tokens, 2 width), the output without its bias of a layer with the input x."""
    rows, tokens, width = y.shape[0], y.shape[1], y.shape[2] // 2
    out = y.new_empty((rows, tokens, width))
    low = low_of(x, table, job_of_row, layer, 1, most_rank)
    chosen = GATE | ({"BLOCK_M": 16} if tokens < MANY_TOKENS else {})
    columns = triton.cdiv(width, chosen["BLOCK_N"] * chosen["TILES"])
    kernels.gate_kernel[(rows * triton.cdiv(tokens, chosen["BLOCK_M"]), columns)](
        y, out, bias, low, table, job_of_row, tokens, width, table.shape[1], layer, most_rank,
        IS_NARROW=most_rank <= BLOCK_RANK, FAST_ERF=y.element_size() == 2, BLOCK_R=BLOCK_RANK, **chosen,
    )  # fmt: skip
    return out


def low_of(
    x: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    layer: int,
    streams: int,
    most_rank: int,
) -> torch.Tensor:
    """The first products of `streams` layers from `layer` on: (streams, rows, tokens, most_rank).

    x, their input: (rows, tokens, width), contiguous. What lies beyond a row's rank has no meaning.
    """
    rows, tokens, width = x.shape
    low = x.new_empty((streams, rows, tokens, most_rank))
    chosen: dict[str, Any] = {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    if tokens < MANY_TOKENS:
        chosen |= {"BLOCK_M": 16, "BLOCK_K": 128}
    elif streams == 1 and tokens < MOST_TOKENS:
        chosen |= {"BLOCK_K": 128}
    elif streams > 1 and tokens >= MOST_TOKENS and _has_shared(x.device, SHARED_BYTES):
        chosen |= {"BLOCK_M": 128}
    chosen |= _fewer_stages(x)
    grid = (rows * triton.cdiv(tokens, chosen["BLOCK_M"]), triton.cdiv(most_rank, BLOCK_RANK))
    kernels.down_kernel[grid](
        x, low, table, job_of_row, rows, tokens, width, table.shape[1], layer, most_rank,
        STREAMS=streams, BLOCK_R=BLOCK_RANK, **chosen,
    )  # fmt: skip
    return low


def conv_low_of(
    x: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    layer: int,
    most_rank: int,
    *,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    scale: int = 1,
) -> torch.Tensor:
    """The first product of a convolution: (1, rows, pixels out, most_rank). As in `add_convolved`."""
    rows, channels, height, width = x.shape
    out_height = (height * scale + 2 * padding - kernel[0]) // stride + 1
    out_width = (width * scale + 2 * padding - kernel[1]) // stride + 1
    low = x.new_empty((1, rows, out_height * out_width, most_rank))
    block_m = 16 if out_height * out_width < MANY_TOKENS else 64
    chosen: dict[str, Any] = {"BLOCK_K": 64, "num_warps": 4, "num_stages": 4} | _fewer_stages(x)
    tiles = triton.cdiv(out_height * out_width, block_m)
    kernels.conv_down_kernel[(rows * tiles, triton.cdiv(most_rank, BLOCK_RANK))](
        x, low, table, job_of_row, height, width, channels, out_height, out_width, table.shape[1], layer,
        most_rank, KERNEL_H=kernel[0], KERNEL_W=kernel[1], STRIDE=stride, PAD=padding, SCALE=scale,
        BLOCK_M=block_m, BLOCK_R=BLOCK_RANK, **chosen,
    )  # fmt: skip
    return low


def add_up(
    outputs: Sequence[torch.Tensor],
    low: torch.Tensor,
    table: torch.Tensor,
    job_of_row: torch.Tensor,
    layer: int,
) -> None:
    """Add the second products to the outputs of up to three layers, in place: (rows, tokens, width) each."""
    rows, tokens, width = outputs[0].shape
    first, second, third = (*outputs, outputs[0], outputs[0])[:3]
    block_m, block_n = (16, 128) if tokens < MANY_TOKENS else (64, 64)
    kernels.up_kernel[
        (rows * triton.cdiv(tokens, block_m), triton.cdiv(width, block_n), len(outputs))
    ](
        first, second, third, low, table, job_of_row, rows, tokens, width, table.shape[1], layer,
        low.shape[3], BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=BLOCK_RANK, num_warps=4, num_stages=2,
    )  # fmt: skip


def _fewer_stages(x: torch.Tensor) -> dict[str, int]:
    """Numbers of four bytes need twice the shared memory, which not every GPU has."""
    return {"num_stages": 2} if x.element_size() > 2 else {}


@functools.cache
def _has_shared(device: torch.device, size: int) -> bool:
    """Whether a block may take `size` bytes of shared memory."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) >= size
