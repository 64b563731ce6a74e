"""Experiment b: time and memory of one attention layer by the size of the picture, for each backend."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker.bench.report import ROWS, Point
from worker.contract.errors import first_line
from worker.device import attention
from worker.device.attention_timing import Kernel, Shape

#: Seconds for which a kernel is repeated; the fastest run counts.
REPEAT_S = 0.3
#: Share of the free memory that one attention on a CPU may take, so that nothing is swapped or killed.
MEMORY_SHARE = 0.5
#: Writing 5 to this file resets the process' peak of resident memory.
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class FirstAttention:
    """The UNet's first self-attention, which has more tokens than any other layer."""

    #: Side of a token, in pixels of the picture.
    token_px: int
    heads: int
    head_width: int
    dtype: torch.dtype

    def shape(self, side_px: int) -> Shape:
        """Its shape for a square picture."""
        tokens = (-(-side_px // self.token_px)) ** 2
        return Shape(tokens, tokens, self.heads, self.head_width, self.dtype)


def first_attention(pipeline: Any) -> FirstAttention:
    """The first self-attention of the pipeline's UNet. Raises `ValueError` if it has none."""
    for level, block in enumerate(pipeline.unet.down_blocks):
        for transformer in getattr(block, "attentions", ()):
            first = transformer.transformer_blocks[0].attn1
            return FirstAttention(
                token_px=int(pipeline.vae_scale_factor) * 2**level,
                heads=first.heads,
                head_width=first.inner_dim // first.heads,
                dtype=first.to_q.weight.dtype,
            )
    raise ValueError("The UNet's down blocks have no attention, so there is nothing to measure.")


def kernel_of(backend: str) -> Kernel:
    """The kernel of a backend, which must work here by `attention.probe`."""
    kernels = {"naive": lambda: attention.naive, "sdpa": lambda: attention.sdpa}
    return kernels.get(backend, attention.load_xformers)()


def curve(
    backend: str, layer: FirstAttention, sides_px: Sequence[int], device: torch.device, *, limit_s: float
) -> Iterator[Point]:
    """A point for each of the rising `sides_px`.

    One that does not fit in memory or would take over `limit_s` has no figures.
    """
    kernel = kernel_of(backend)
    last: tuple[int, float] | None = None
    failed = ""
    for side_px in sides_px:
        shape = layer.shape(side_px)
        left_out = failed or _reason_to_skip(kernel, shape, device, last, limit_s)
        if not left_out:
            try:
                seconds, memory = measure(kernel, shape, device)
            except torch.OutOfMemoryError:
                left_out = failed = "does not fit in the GPU's memory"
            except Exception as error:  # noqa: BLE001 - a kernel may refuse a size
                left_out = failed = first_line(error)
        if left_out:
            yield Point(backend, side_px, shape.query_tokens, left_out=left_out)
            continue
        last = shape.query_tokens, seconds
        mebibytes = None if memory is None else memory / 2**20
        yield Point(backend, side_px, shape.query_tokens, 1e3 * seconds, mebibytes)


def measure(kernel: Kernel, shape: Shape, device: torch.device) -> tuple[float, int | None]:
    """Seconds of one call for `ROWS` rows, the fastest of several, and its peak bytes beyond its inputs."""
    drawn = shape.draw(ROWS, device)
    scale = shape.head_width**-0.5

    def run() -> None:
        kernel(*drawn, scale)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        # The first call also loads the kernel, which takes time and memory.
        run()
        memory = peak_bytes(run, device)
        times_s: list[float] = []
        while sum(times_s) < REPEAT_S:
            started_s = time.perf_counter()
            run()
            times_s.append(time.perf_counter() - started_s)
    return min(times_s), memory


def peak_bytes(run: Callable[[], None], device: torch.device) -> int | None:
    """The peak memory of `run` in bytes; None where the system does not report it.

    On a GPU, torch's own count. On a CPU, the process' resident memory: Linux can reset its peak (clear_refs
    in proc(5)), after glibc has returned the memory that it keeps for later allocations.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not _CLEAR_REFS.exists():
        return None
    trim(0)
    _CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _reason_to_skip(
    kernel: Kernel, shape: Shape, device: torch.device, last: tuple[int, float] | None, limit_s: float
) -> str:
    """Why this size is not measured, or "". `last`: tokens and seconds of the size before.

    The memory of a GPU is not checked: running out of it does no harm.
    """
    if last is not None:
        tokens, seconds = last
        # Every exact attention computes all pairs of tokens, however little memory it takes.
        needed_s = seconds * (shape.query_tokens / tokens) ** 2
        if needed_s > limit_s:
            return f"would take about {needed_s:.0f} s"
    if device.type == "cpu" and kernel is attention.naive:
        # The matrix of all pairs, before and after the softmax.
        needed = 2 * ROWS * shape.heads * shape.query_tokens * shape.key_tokens * shape.dtype.itemsize
        free = _free_bytes()
        if free is not None and needed > MEMORY_SHARE * free:
            return f"would take {needed / 2**30:.0f} GiB of memory"
    return ""


def _free_bytes() -> int | None:
    """Available memory of the machine; None where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
