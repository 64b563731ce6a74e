"""Functions of tensors as CUDA graphs: captured when first used, then replayed.

A graph's shapes are fixed, so a batch is padded to one of the captured batch sizes. A replay runs no Python
of the model and compiles nothing: one launch is the whole step, from the latents through model, guidance and
scheduler to the next latents.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from worker.device.compiler import CompiledLanes, Compiler
from worker.device.family import Lane, lane_name
from worker.device.step import Batch, Forward, Step, denoise

logger = logging.getLogger("smallcat.engine")

#: Captured batch sizes: up to the first number of rows, multiples of the second.
SPACING = ((8, 2), (32, 4), (56, 8))
#: The largest captured batch size. No GPU is known that gains by more. And from 64 rows on, diffusers
#: upsamples by another path (models/upsampling.py), which would have to be compiled apart.
MAX_ROWS = SPACING[-1][0]
#: Runs before a capture. Kernels are loaded and chosen in the first ones, which a graph cannot record.
WARM_UPS = 2

#: What a graph records: a function that reads tensors that stay in their place.
Captured = Callable[[], tuple[torch.Tensor, ...]]
_Function = Callable[[Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def batch_size(rows: int) -> int:
    """The smallest captured batch size that `rows`, 1 to `MAX_ROWS`, fit in."""
    spacing = next(spacing for limit, spacing in SPACING if rows <= limit)
    return -(-rows // spacing) * spacing


class Graph:
    """A function of tensors, with inputs that stay in their place, and its CUDA graph.

    Used by one thread, on one stream.
    """

    def __init__(
        self,
        name: str,
        function: Captured,
        inputs: Sequence[torch.Tensor],
        pool: Any,
        compiler: Compiler,
    ) -> None:
        """`function` reads `inputs`. `run` captures it, once `compiler` holds no `device_sync_lock`.

        Graphs of one `pool` share their memory: they must never run at the same time. `name` is for the log.
        """
        self._name = name
        #: Most bytes of the GPU's memory in use during the capture, all else included; 0: not captured.
        self.peak = 0
        self._function = function
        self._inputs = inputs
        self._pool = pool
        self._compiler = compiler
        self._graph: Any = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def run(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for `values`, on the current stream. The next run of the same pool overwrites them.

        Values may be shorter than the inputs. The outputs beyond their length have no meaning.
        Raises what torch raises when it does not fit in memory.
        """
        for padded, value in zip(self._inputs, values, strict=True):
            padded[: len(value)].copy_(value, non_blocking=True)
        if self._graph is None:
            if not self._compiler.device_sync_lock.acquire(blocking=False):
                return self._function()
            try:
                self._capture()
            finally:
                self._compiler.device_sync_lock.release()
        self._graph.replay()
        return self._outputs

    def _capture(self) -> None:
        started_s = time.monotonic()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._function()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device during the capture: they run steps, decode or encode texts.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._outputs = self._function()
        self._graph = graph
        self.peak = torch.cuda.max_memory_allocated()
        logger.info(
            "captured a CUDA graph for %s in %.1f s; GPU memory: %.2f GiB at most, %.2f GiB held",
            self._name,
            time.monotonic() - started_s,
            self.peak / 2**30,
            torch.cuda.memory_reserved() / 2**30,
        )


class GraphPool:
    """Graphs that share their memory, by name. Used by one thread; they must never run at the same time."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._graphs: dict[str, Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(
        self,
        name: str,
        make: Callable[[], tuple[Captured, Sequence[torch.Tensor]]],
        values: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of the graph called `name` for `values`: see `Graph.run`.

        Where there is none yet, `make` gives its function and inputs.
        Raises what torch raises when it does not fit in memory.
        """
        try:
            if name not in self._graphs:
                self._graphs[name] = Graph(name, *make(), self._pool, self._compiler)
            return self._graphs[name].run(values)
        except Exception:
            # A failed capture leaves its memory in the pool, where only other captures of the pool find it.
            # So all graphs are dropped with their pool, and captured again.
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()
            raise

    @property
    def peaks(self) -> dict[str, int]:
        """Most bytes of the GPU's memory during the capture of each graph, by name, all else included."""
        return {name: graph.peak for name, graph in list(self._graphs.items()) if graph.peak}


class StepGraphs:
    """A graph of the compiled step for each lane, kind of batch and batch size (`worker.device.step.Batch`).

    Used by one thread; another one compiles. `at_once` batches are replayed side by side, each by a graph of
    its own on a stream of its own.
    """

    def __init__(self, forward: Forward, compiler: Compiler, *, at_once: int = 1) -> None:
        self._lanes: CompiledLanes[_Function] = CompiledLanes("step", partial(denoise, forward), compiler)
        self._pools = [GraphPool(compiler) for _ in range(at_once)]
        self._streams = [torch.cuda.Stream() for _ in range(at_once)] if at_once > 1 else []
        #: Rows that batches had beside those of jobs so far.
        self.padded_rows = 0

    @property
    def peaks(self) -> dict[str, int]:
        """Most bytes of the GPU's memory in a step of each batch size so far, weights included, by name."""
        return self._pools[0].peaks

    def compile(self, lane: Lane, batch: Batch) -> bool:
        """Compile `lane` now, for batches like `batch`. Returns whether that worked."""
        return self._lanes.compile_now(_name(lane, batch), lambda: _example(batch))

    def run(self, lane: Lane, batches: Sequence[Batch]) -> list[Step | None]:
        """The step of each batch, replayed. None where its kind is not compiled; this call may begin to.

        Raises what torch raises, its out-of-memory included, when a new batch size cannot be captured.
        """
        kinds = {_name(lane, batch): batch for batch in batches}
        functions = {name: self._lanes.get(name, partial(_example, batch)) for name, batch in kinds.items()}
        if not self._streams:
            return [self._step(functions, lane, batch, self._pools[0]) for batch in batches]
        current = torch.cuda.current_stream()
        steps = []
        at_once = len(self._streams)
        for start in range(0, len(batches), at_once):
            together = batches[start : start + at_once]
            for batch, pool, stream in zip(together, self._pools, self._streams, strict=False):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    steps.append(self._step(functions, lane, batch, pool))
            for stream in self._streams:
                current.wait_stream(stream)
        return steps

    def _step(
        self, functions: Mapping[str, _Function | None], lane: Lane, batch: Batch, pool: GraphPool
    ) -> Step | None:
        # What no kernel does, is done uncompiled.
        needs_loop = batch.loras is not None and batch.loras.needs_loop
        if needs_loop or (function := functions[_name(lane, batch)]) is None:
            return None
        jobs, rows = len(batch.states), batch_size(len(batch.job_of_row))
        self.padded_rows += rows - len(batch.job_of_row)
        # Where all jobs are guided there are half as many jobs as rows, and what is computed once for each
        # job costs half as much. Compiled code takes two jobs or more.
        padded_jobs = max(2, rows // 2)
        if jobs > padded_jobs:
            padded_jobs = rows
        name = f"{rows} rows of {padded_jobs} jobs with {_name(lane, batch)}"
        if batch.loras is not None:
            name += f", ranks to {len(batch.loras.room)}"
            # The addresses of jobs that are no longer there must not stay in the graph's input.
            batch = dataclasses.replace(batch, loras=batch.loras.padded(padded_jobs))

        def make() -> tuple[Captured, Sequence[torch.Tensor]]:
            inputs = batch.zeros(padded_jobs, rows)
            return lambda: function(inputs), inputs.tensors()

        # Clones, because the graph's next replay overwrites its outputs.
        return Step(*(output[:jobs].clone() for output in pool.run(name, make, batch.tensors())))


def _name(lane: Lane, batch: Batch) -> str:
    """What a function is compiled for: all shapes but the numbers of jobs and rows."""
    return f"{batch.kind}, {lane_name(lane)}"


def _example(batch: Batch) -> tuple[Batch, list[torch.Tensor]]:
    """A batch like `batch`, whose numbers of jobs and rows are dynamic."""
    example = batch.zeros(jobs=4, rows=6)
    return example, example.tensors()
