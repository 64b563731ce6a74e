"""Low-rank products of mixed rows on a GPU, in Triton: each row with the factors of its own job.

A layer's input x, (rows, tokens, width), becomes x @ downᵀ by one kernel, and a second one adds that times
scale @ up to the layer's output. Of small ranks one kernel does both. Which factors a row has is read on the
device, from a table of addresses (`worker.device.loras.job_set`), so that a captured CUDA graph serves all
factors that there ever are. A row without any costs nothing but the look. The products of S-LoRA (Sheng et
al., 2023) and Punica (Chen et al., 2023), for rows of many tokens.

They are launched by `worker.device.loras.products`. This module is imported where there is a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker.device.gelu import gelu

#: Numbers of a layer in the table: see `worker.device.loras.job_set`.
FIELDS = tl.constexpr(5)
#: Ranks that one program of a first product computes, and one turn of a second product's loop.
BLOCK_RANK = 32


@triton.jit  # type: ignore[untyped-decorator]
def _down_tile(down, rank, ranks, place, inside, width, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of the first factor, (place, ranks): zeros beyond `rank`. `down`: its address, (rank, width)."""
    factor = tl.multiple_of(down, 16).to(tl.pointer_type(DTYPE))
    mask = inside[:, None] & (ranks < rank)[None, :]
    return tl.load(factor + ranks[None, :].to(tl.int64) * width + place[:, None], mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def down_kernel(  # type: ignore[no-untyped-def]
    x, low, table, job_of_row, rows, tokens, width, layers, layer, most_rank,
    STREAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`low`[stream] = x @ downᵀ for up to three layers that share x, (rows, tokens, width), contiguous."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) // tiles
    first = tl.program_id(1) * BLOCK_R
    entry = table + (tl.load(job_of_row + row) * layers + layer) * FIELDS
    rank_0 = tl.load(entry + 2)
    rank_1 = rank_0
    rank_2 = rank_0
    down_0 = tl.load(entry)
    down_1 = down_0
    down_2 = down_0
    if STREAMS > 1:
        rank_1 = tl.load(entry + FIELDS + 2)
        down_1 = tl.load(entry + FIELDS)
    if STREAMS > 2:
        rank_2 = tl.load(entry + 2 * FIELDS + 2)
        down_2 = tl.load(entry + 2 * FIELDS)
    if first < tl.maximum(rank_0, tl.maximum(rank_1, rank_2)):
        token = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        ranks = first + tl.arange(0, BLOCK_R)
        x_row = x + row.to(tl.int64) * tokens * width
        sum_0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        sum_1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        sum_2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(0, width, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            inside = place < width
            mask = (token < tokens)[:, None] & inside[None, :]
            tile = tl.load(x_row + token[:, None] * width + place[None, :], mask=mask, other=0.0)
            dtype = x.dtype.element_ty
            factor = _down_tile(down_0, rank_0, ranks, place, inside, width, dtype)
            sum_0 = tl.dot(tile, factor, sum_0, input_precision="ieee")
            if STREAMS > 1:
                factor = _down_tile(down_1, rank_1, ranks, place, inside, width, dtype)
                sum_1 = tl.dot(tile, factor, sum_1, input_precision="ieee")
            if STREAMS > 2:
                factor = _down_tile(down_2, rank_2, ranks, place, inside, width, dtype)
                sum_2 = tl.dot(tile, factor, sum_2, input_precision="ieee")
        size = rows.to(tl.int64) * tokens * most_rank
        to = low + (row.to(tl.int64) * tokens + token[:, None]) * most_rank + ranks[None, :]
        mask = (token < tokens)[:, None]
        tl.store(to, sum_0.to(low.dtype.element_ty), mask=mask)
        if STREAMS > 1:
            tl.store(to + size, sum_1.to(low.dtype.element_ty), mask=mask)
        if STREAMS > 2:
            tl.store(to + 2 * size, sum_2.to(low.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def conv_down_kernel(  # type: ignore[no-untyped-def]
    x, low, table, job_of_row, height, width, channels, out_height, out_width, layers, layer, most_rank,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`low` = the convolution of x with down, (rank, taps, channels).

    x: (rows, height, width, channels), contiguous. `SCALE`: how often each of its pixels is repeated both
    ways before the convolution: 2 for an upsampler, else 1.
    """
    tokens = out_height * out_width
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) // tiles
    first = tl.program_id(1) * BLOCK_R
    entry = table + (tl.load(job_of_row + row) * layers + layer) * FIELDS
    rank = tl.load(entry + 2)
    if first < rank:
        down = tl.load(entry)
        token = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        ranks = first + tl.arange(0, BLOCK_R)
        x_row = x + row.to(tl.int64) * height * width * channels
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        blocks = tl.cdiv(channels, BLOCK_K)
        for turn in range(KERNEL_H * KERNEL_W * blocks):
            tap = turn // blocks
            place = (turn % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = place < channels
            y = (token // out_width) * STRIDE + tap // KERNEL_W - PAD
            z = (token % out_width) * STRIDE + tap % KERNEL_W - PAD
            seen = (token < tokens) & (y >= 0) & (z >= 0) & (y < height * SCALE) & (z < width * SCALE)
            pixel = (y // SCALE) * width + z // SCALE
            mask = seen[:, None] & inside[None, :]
            tile = tl.load(x_row + pixel[:, None] * channels + place[None, :], mask=mask, other=0.0)
            all_taps = KERNEL_H * KERNEL_W * channels
            factor = _down_tile(
                down, rank, ranks, tap * channels + place, inside, all_taps, x.dtype.element_ty
            )
            total = tl.dot(tile, factor, total, input_precision="ieee")
        to = low + (row.to(tl.int64) * tokens + token[:, None]) * most_rank + ranks[None, :]
        tl.store(to, total.to(low.dtype.element_ty), mask=(token < tokens)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    low, up, rank, ranks_row, place, inside, width, seen, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of low @ up, float32. `low`: pointers to its tokens; `up`: an address, (rank, width)."""
    factor = tl.multiple_of(up, 16).to(tl.pointer_type(DTYPE))
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + ranks_row
        left = tl.load(low[:, None] + ranks[None, :], mask=seen[:, None], other=0.0)
        mask = (ranks < rank)[:, None] & inside[None, :]
        right = tl.load(factor + ranks[:, None].to(tl.int64) * width + place[None, :], mask=mask, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _scaled(value, total, entry, place, inside):  # type: ignore[no-untyped-def]
    """A layer's output (without its bias) and the low-rank product, added; DoRA's scale of the output."""
    scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
    dora = tl.load(entry + 4)
    # No branch: it would keep loads in a loop from being made ahead.
    factor = dora.to(tl.pointer_type(tl.float32))
    value *= tl.load(factor + place, mask=inside & (dora != 0), other=1.0)[None, :]
    return value + total * scale


@triton.jit  # type: ignore[untyped-decorator]
def up_kernel(  # type: ignore[no-untyped-def]
    y_0, y_1, y_2, low, table, job_of_row, rows, tokens, width, layers, layer, most_rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = y * dora + scale * (low @ up), in place, for up to three layers: (rows, tokens, width) each."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) // tiles
    stream = tl.program_id(2)
    entry = table + (tl.load(job_of_row + row) * layers + layer + stream) * FIELDS
    rank = tl.load(entry + 2)
    if rank > 0:
        y = y_0
        if stream == 1:
            y = y_1
        if stream == 2:
            y = y_2
        token = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        seen, inside = token < tokens, place < width
        position = row.to(tl.int64) * tokens + token
        low_row = low + (stream.to(tl.int64) * rows * tokens + position) * most_rank
        total = _product(
            low_row, tl.load(entry + 1), rank, tl.arange(0, BLOCK_R), place, inside, width, seen,
            low.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        at = y + position[:, None] * width + place[None, :]
        mask = seen[:, None] & inside[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        value = _scaled(value, total, entry, place, inside)
        tl.store(at, value.to(y_0.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _add_product(  # type: ignore[no-untyped-def]
    y, low, entry, position, seen, ranks, width, BLOCK_N: tl.constexpr
):  # fmt: skip
    """y = y * dora + scale * (low @ up) at some tokens, of which `low` is at hand."""
    dtype = y.dtype.element_ty
    rank = tl.load(entry + 2)
    up = tl.multiple_of(tl.load(entry + 1), 16).to(tl.pointer_type(dtype))
    for start in range(0, width, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        inside = place < width
        mask = (ranks < rank)[:, None] & inside[None, :]
        right = tl.load(up + ranks[:, None] * width + place[None, :], mask=mask, other=0.0)
        at = y + position[:, None] * width + place[None, :]
        mask = seen[:, None] & inside[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        total = tl.dot(low, right, input_precision="ieee")
        tl.store(at, _scaled(value, total, entry, place, inside).to(dtype), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def both_kernel(  # type: ignore[no-untyped-def]
    x, y_0, y_1, y_2, table, job_of_row, tokens, width, out_width, layers, layer,
    STREAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What `down_kernel` and `up_kernel` do, for ranks up to `BLOCK_R`: x @ downᵀ stays in the program."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) // tiles
    entry = table + (tl.load(job_of_row + row) * layers + layer) * FIELDS
    rank_0 = tl.load(entry + 2)
    rank_1 = rank_0
    rank_2 = rank_0
    down_0 = tl.load(entry)
    down_1 = down_0
    down_2 = down_0
    if STREAMS > 1:
        rank_1 = tl.load(entry + FIELDS + 2)
        down_1 = tl.load(entry + FIELDS)
    if STREAMS > 2:
        rank_2 = tl.load(entry + 2 * FIELDS + 2)
        down_2 = tl.load(entry + 2 * FIELDS)
    if tl.maximum(rank_0, tl.maximum(rank_1, rank_2)) > 0:
        token = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        ranks = tl.arange(0, BLOCK_R)
        dtype = x.dtype.element_ty
        position = row.to(tl.int64) * tokens + token
        sum_0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        sum_1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        sum_2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(0, width, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            inside = place < width
            mask = (token < tokens)[:, None] & inside[None, :]
            tile = tl.load(x + position[:, None] * width + place[None, :], mask=mask, other=0.0)
            factor = _down_tile(down_0, rank_0, ranks, place, inside, width, dtype)
            sum_0 = tl.dot(tile, factor, sum_0, input_precision="ieee")
            if STREAMS > 1:
                factor = _down_tile(down_1, rank_1, ranks, place, inside, width, dtype)
                sum_1 = tl.dot(tile, factor, sum_1, input_precision="ieee")
            if STREAMS > 2:
                factor = _down_tile(down_2, rank_2, ranks, place, inside, width, dtype)
                sum_2 = tl.dot(tile, factor, sum_2, input_precision="ieee")
        seen = token < tokens
        _add_product(y_0, sum_0.to(dtype), entry, position, seen, ranks, out_width, BLOCK_N)
        if STREAMS > 1:
            other = entry + FIELDS
            _add_product(y_1, sum_1.to(dtype), other, position, seen, ranks, out_width, BLOCK_N)
        if STREAMS > 2:
            other = entry + 2 * FIELDS
            _add_product(y_2, sum_2.to(dtype), other, position, seen, ranks, out_width, BLOCK_N)


@triton.jit  # type: ignore[untyped-decorator]
def gate_kernel(  # type: ignore[no-untyped-def]
    y, out, bias, low, table, job_of_row, tokens, width, layers, layer, most_rank,
    IS_NARROW: tl.constexpr, FAST_ERF: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = value * gelu(gate) for the two halves of y * dora + scale * (low @ up) + bias.

    y: (rows, tokens, 2 width); out: (rows, tokens, width). The gate of GEGLU (Shazeer, 2020).
    `IS_NARROW`: no rank is above `BLOCK_R`. `TILES`: tiles beside each other that a program computes.
    """
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) // tiles
    entry = table + (tl.load(job_of_row + row) * layers + layer) * FIELDS
    rank = tl.load(entry + 2)
    up = tl.load(entry + 1)
    token = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    seen = token < tokens
    position = row.to(tl.int64) * tokens + token
    low_row = low + position * most_rank
    ranks = tl.arange(0, BLOCK_R)
    dtype = low.dtype.element_ty
    if IS_NARROW:
        left = tl.load(low_row[:, None] + ranks[None, :], mask=seen[:, None] & (rank > 0), other=0.0)
        factor = tl.multiple_of(up, 16).to(tl.pointer_type(dtype))
        rows_of_up = factor + ranks[:, None].to(tl.int64) * (2 * width)
        there = (ranks < rank)[:, None]
    for turn in range(TILES):
        place = (tl.program_id(1) * TILES + turn) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = place < width
        mask = seen[:, None] & inside[None, :]
        at = y + position[:, None] * (2 * width) + place[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
        if rank > 0:
            if IS_NARROW:
                right = tl.load(rows_of_up + place[None, :], mask=there & inside[None, :], other=0.0)
                other = tl.load(
                    rows_of_up + (width + place)[None, :], mask=there & inside[None, :], other=0.0
                )
                total = tl.dot(left, right, input_precision="ieee")
                other_total = tl.dot(left, other, input_precision="ieee")
            else:
                total = _product(
                    low_row, up, rank, ranks, place, inside, 2 * width, seen, dtype, BLOCK_M, BLOCK_N, BLOCK_R
                )
                other_total = _product(
                    low_row, up, rank, ranks, place + width, inside, 2 * width, seen, dtype,
                    BLOCK_M, BLOCK_N, BLOCK_R,
                )  # fmt: skip
            value = _scaled(value, total, entry, place, inside)
            gate = _scaled(gate, other_total, entry, place + width, inside)
        value += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + width + place, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate = gelu(gate, FAST_ERF)
        to = out + position[:, None] * width + place[None, :]
        tl.store(to, (value * gate).to(out.dtype.element_ty), mask=mask)
