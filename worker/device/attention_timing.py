"""How long an attention kernel takes, by the sizes of the attention: measured once, and kept in a file."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker.contract.versions import versions

#: (queries, keys, values, scale) to the attention's result; tensors are (batch, tokens, heads, head width).
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

#: Rows that `auto` times a kernel with: a full batch, in which launches do not dominate.
TIMED_ROWS = 32
#: Calls in one timing, and timings of each kernel, at least and at most; the fastest one counts.
_CALLS, _LEAST_TIMINGS, _TIMINGS = 4, 2, 8
#: Milliseconds of a kernel's calls after which it is not timed again, and most pairs of tokens in a call.
_TIMED_MS, _TIMED_PAIRS = 20.0, TIMED_ROWS * 4096 * 4096


@dataclass(frozen=True)
class Shape:
    """The sizes of one attention in a forward of one row."""

    query_tokens: int
    key_tokens: int
    heads: int
    head_width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.query_tokens}x{self.key_tokens} {self.heads} heads of {self.head_width} {dtype}"

    def draw(self, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random queries, keys and values of this shape."""
        tokens = (self.query_tokens, self.key_tokens, self.key_tokens)
        query, key, value = (
            torch.randn(rows, n, self.heads, self.head_width, device=device, dtype=self.dtype) for n in tokens
        )
        return query, key, value


class Timings:
    """Milliseconds by shape and backend, kept in a file for the next start on the same GPU and libraries."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        xformers = (f"{name} {version}" for name, version in versions(["xformers"]).items())
        self._setup = " ".join([torch.cuda.get_device_name(device), torch.__version__, *xformers])
        self._all: dict[str, dict[str, dict[str, float]]] = {}
        # A file that cannot be read counts as none, and is written anew.
        with contextlib.suppress(OSError, ValueError):
            self._all = dict(json.loads(path.read_text("utf-8")))

    def of(self, shape: Shape) -> dict[str, float]:
        """The times of `shape` that are known, by backend."""
        return self._all.get(self._setup, {}).get(str(shape), {})

    def keep(self, shape: Shape, times: dict[str, float]) -> None:
        """Keep those of `times` that are finite."""
        finite = {name: time for name, time in times.items() if math.isfinite(time)}
        self._all.setdefault(self._setup, {})[str(shape)] = finite

    def save(self) -> None:
        """Write the file. Where that fails, the next start measures again."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(self._all, indent=1), "utf-8")
            temporary.replace(self._path)


def time_kernel(kernel: Kernel, shape: Shape, device: torch.device) -> float:
    """Milliseconds of one attention of `TIMED_ROWS` rows.

    The fastest of several timings: other processes may use the GPU, and the first calls load kernels.
    """
    pairs = TIMED_ROWS * shape.query_tokens * shape.key_tokens
    # Such as that of the VAE: fewer rows fill a GPU, and no more are decoded at once.
    rows = TIMED_ROWS if pairs <= _TIMED_PAIRS else max(1, TIMED_ROWS * _TIMED_PAIRS // pairs)
    drawn = shape.draw(rows, device)
    scale = shape.head_width**-0.5
    event: Any = torch.cuda.Event
    times = []
    for _ in range(_TIMINGS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        for _ in range(_CALLS):
            kernel(*drawn, scale)
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / _CALLS)
        if len(times) >= _LEAST_TIMINGS and sum(times) * _CALLS > _TIMED_MS:
            break
    return min(times) * TIMED_ROWS / rows
