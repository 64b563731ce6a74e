"""Experiment b: time and memory of one attention of the UNet by the picture's size, for each backend."""

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
from worker.device.attention import Kernel, Shape

#: Seconds for which a kernel is run again and again; the fastest run counts.
ENOUGH_S = 0.3
#: Share of a CPU's free memory that one attention may take: what is swapped or killed is not measured.
MEMORY_SHARE = 0.5
#: Writing a 5 there sets the process' highest mark to what it has resident now.
_MARK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Place:
    """The UNet's first self-attention, which has more tokens than any other."""

    #: Pixels of the picture that a token's side stands for.
    token_px: int
    heads: int
    head_width: int
    dtype: torch.dtype

    def shape(self, side_px: int) -> Shape:
        """It, for a square picture."""
        tokens = (-(-side_px // self.token_px)) ** 2
        return Shape(tokens, tokens, self.heads, self.head_width, self.dtype)


def place_in(pipeline: Any) -> Place:
    """Where `pipeline`'s UNet has its first self-attention."""
    for level, block in enumerate(pipeline.unet.down_blocks):
        for transformer in getattr(block, "attentions", ()):
            first = transformer.transformer_blocks[0].attn1
            return Place(
                token_px=int(pipeline.vae_scale_factor) * 2**level,
                heads=first.heads,
                head_width=first.inner_dim // first.heads,
                dtype=first.to_q.weight.dtype,
            )
    raise ValueError("The UNet has no attention on its way down.")


def kernel_of(backend: str) -> Kernel:
    """The attention of a backend that `attention.probe` finds no fault with."""
    kernels = {"naive": lambda: attention.naive, "sdpa": lambda: attention.sdpa}
    return kernels.get(backend, attention.load_xformers)()


def curve(
    backend: str, place: Place, sides_px: Sequence[int], device: torch.device, *, limit_s: float
) -> Iterator[Point]:
    """A point for each of the rising `sides_px`; what does not fit or takes over `limit_s` is left out."""
    kernel = kernel_of(backend)
    known: tuple[int, float] | None = None
    failed = ""
    for side_px in sides_px:
        shape = place.shape(side_px)
        left_out = failed or _too_much(kernel, shape, device, known, limit_s)
        if not left_out:
            try:
                seconds, memory = measure(kernel, shape, device)
            except torch.OutOfMemoryError:
                left_out = failed = "does not fit in the GPU's memory"
            except Exception as error:  # noqa: BLE001 - a kernel may refuse a size, and says why
                left_out = failed = first_line(error)
        if left_out:
            yield Point(backend, side_px, shape.query_tokens, left_out=left_out)
            continue
        known = shape.query_tokens, seconds
        mebibytes = None if memory is None else memory / 2**20
        yield Point(backend, side_px, shape.query_tokens, 1e3 * seconds, mebibytes)


def measure(kernel: Kernel, shape: Shape, device: torch.device) -> tuple[float, int | None]:
    """Seconds of one call for `ROWS` rows, the fastest of several, and its most bytes beyond its inputs."""
    drawn = shape.draw(ROWS, device)
    scale = shape.head_width**-0.5

    def run() -> None:
        kernel(*drawn, scale)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        # The first one loads the kernel, which takes time and memory of its own.
        run()
        memory = peak_bytes(run, device)
        times_s: list[float] = []
        while sum(times_s) < ENOUGH_S:
            started_s = time.perf_counter()
            run()
            times_s.append(time.perf_counter() - started_s)
    return min(times_s), memory


def peak_bytes(run: Callable[[], None], device: torch.device) -> int | None:
    """The most memory that `run` holds at any time; None where the system does not tell.

    Of a GPU, torch's own count. Of a CPU, what the process has resident: Linux lets a process reset the
    highest mark (clear_refs in proc(5)), and glibc gives back what it keeps for the next allocation.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not _MARK.exists():
        return None
    trim(0)
    _MARK.write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _too_much(
    kernel: Kernel, shape: Shape, device: torch.device, known: tuple[int, float] | None, limit_s: float
) -> str:
    """Why not to try; "" when nothing speaks against it. A GPU that is too small says so without harm."""
    if known is not None:
        tokens, seconds = known
        # Every exact attention looks at all pairs, whatever it holds in memory.
        needed_s = seconds * (shape.query_tokens / tokens) ** 2
        if needed_s > limit_s:
            return f"would take about {needed_s:.0f} s"
    if device.type == "cpu" and kernel is attention.naive:
        # The matrix of all pairs before and after the softmax.
        needed = 2 * ROWS * shape.heads * shape.query_tokens * shape.key_tokens * shape.dtype.itemsize
        free = _free_bytes()
        if free is not None and needed > MEMORY_SHARE * free:
            return f"would take {needed / 2**30:.0f} GiB of memory"
    return ""


def _free_bytes() -> int | None:
    """Memory that processes may still take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
