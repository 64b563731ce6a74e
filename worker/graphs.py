"""The compiled step as CUDA graphs: one for each lane and bucket, captured when first used, then replayed.

A **bucket** is a number of rows that batches are padded to, so that a graph of fixed shapes fits them. No
Python of the model runs in a replay, and nothing is compiled: one launch is the whole step, from the latents
over UNet, guidance and scheduler to the next latents.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from worker.compiler import CompiledLanes, Compiler
from worker.denoiser import Batch, Step, denoise

logger = logging.getLogger("smallcat.engine")

#: From rows up to the first number on, buckets are the second number of rows apart.
SPACING = ((8, 2), (32, 4), (56, 8))
#: The largest bucket. diffusers' upsampling takes another way from 64 rows on (models/upsampling.py), which
#: would have to be compiled apart; and no GPU is known that gains by more.
MAX_ROWS = SPACING[-1][0]
#: Steps before a capture: kernels are loaded and chosen in the first ones, which no graph may hold.
WARM_UPS = 2

_Function = Callable[[Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def bucket_of(rows: int) -> int:
    """The least bucket that `rows`, 1 to `MAX_ROWS`, fit in."""
    spacing = next(spacing for limit, spacing in SPACING if rows <= limit)
    return -(-rows // spacing) * spacing


class Graphs:
    """All graphs of a UNet. Used by one thread, but for what compiles.

    `at_once` batches are replayed side by side, each by a graph of its own on a stream of its own.
    """

    def __init__(self, unet: Any, compiler: Compiler, *, at_once: int = 1) -> None:
        self._lanes: CompiledLanes[_Function] = CompiledLanes(
            "step", functools.partial(denoise, unet), compiler
        )
        self._graphs: dict[tuple[Hashable, int], list[Graph]] = {}
        self._at_once = at_once
        #: The GPU's memory in bytes, at most, in a step of each bucket, weights included.
        self.peaks: dict[str, int] = {}
        # Graphs that never run at the same time share their memory.
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(at_once)]
        self._streams = [torch.cuda.Stream() for _ in range(at_once)] if at_once > 1 else []

    def compile(self, lane: Hashable, batch: Batch) -> bool:
        """Compile `lane` now, for batches like `batch`; whether it worked."""
        return self._lanes.compile_now(lane, lambda: _example(batch))

    def run(self, lane: Hashable, batches: Sequence[Batch]) -> list[Step] | None:
        """The step of each batch, replayed; None while `lane` is not compiled, which this may set off.

        Raises what torch raises, its out-of-memory included, when a new bucket cannot be captured.
        """
        function = self._lanes.get(lane, lambda: _example(batches[0]))
        if function is None:
            return None
        if not self._streams:
            return [self._graph(function, lane, batch, 0).run(batch) for batch in batches]
        here = torch.cuda.current_stream()
        steps = []
        for start in range(0, len(batches), self._at_once):
            for place, batch in enumerate(batches[start : start + self._at_once]):
                graph, stream = self._graph(function, lane, batch, place), self._streams[place]
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    steps.append(graph.run(batch))
            for stream in self._streams:
                here.wait_stream(stream)
        return steps

    def _graph(self, function: _Function, lane: Hashable, batch: Batch, place: int) -> Graph:
        bucket = bucket_of(len(batch.job_of_row))
        graphs = self._graphs.setdefault((lane, bucket), [])
        if place == len(graphs):
            graphs.append(self._capture(function, batch, bucket, self._pools[place]))
        return graphs[place]

    def _capture(self, function: _Function, batch: Batch, bucket: int, pool: Any) -> Graph:
        started_s = time.monotonic()
        torch.cuda.reset_peak_memory_stats()
        graph = Graph(function, batch, bucket, pool)
        what = f"{bucket} rows of {'x'.join(str(side) for side in batch.states.shape[2:])}"
        self.peaks[what] = torch.cuda.max_memory_allocated()
        logger.info(
            "captured %s in %.1f s; GPU memory: %.2f GiB at most, %.2f GiB held",
            what,
            time.monotonic() - started_s,
            self.peaks[what] / 2**30,
            torch.cuda.memory_reserved() / 2**30,
        )
        return graph


class Graph:
    """One bucket of one lane: tensors that stay where they are, and the graph between them."""

    def __init__(self, function: _Function, batch: Batch, rows: int, pool: Any) -> None:
        """Capture `function` for up to `rows` rows, and as many jobs, of batches like `batch`."""
        self._inputs = batch.room_for(jobs=rows, rows=rows)
        self._fill(batch)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(self._inputs)
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: they decode, encode texts or compile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = function(self._inputs)

    def run(self, batch: Batch) -> Step:
        """The step of `batch` on the current stream, in tensors of its own."""
        self._fill(batch)
        self._graph.replay()
        jobs = len(batch.states)
        states, predictions, finite = (output[:jobs].clone() for output in self._outputs)
        return Step(states, predictions, finite)

    def _fill(self, batch: Batch) -> None:
        """Copy the batch to where the graph reads it. Nobody looks at the result of what lies beyond it."""
        for room, part in zip(self._inputs.tensors(), batch.tensors(), strict=True):
            room[: len(part)].copy_(part, non_blocking=True)


def _example(batch: Batch) -> tuple[Batch, list[torch.Tensor]]:
    """A batch like `batch`, of no particular number of rows."""
    example = batch.room_for(jobs=4, rows=4)
    return example, example.tensors()
