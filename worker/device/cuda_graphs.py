"""Functions of tensors as CUDA graphs: captured when first used, then replayed.

A graph's shapes are fixed, so a batch is padded to a **bucket**: a number of rows that there is a graph for.
No Python of the model runs in a replay, and nothing is compiled: one launch is the whole step, from the
latents over UNet, guidance and scheduler to the next latents.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from worker.device.compiler import CompiledLanes, Compiler
from worker.device.step import Batch, Step, denoise

logger = logging.getLogger("smallcat.engine")

#: From rows up to the first number on, buckets are the second number of rows apart.
SPACING = ((8, 2), (32, 4), (56, 8))
#: The largest bucket. diffusers' upsampling takes another way from 64 rows on (models/upsampling.py), which
#: would have to be compiled apart; and no GPU is known that gains by more.
MAX_ROWS = SPACING[-1][0]
#: Runs before a capture: kernels are loaded and chosen in the first ones, which no graph may hold.
WARM_UPS = 2

#: What a graph holds: it reads tensors that stay where they are.
Captured = Callable[[], tuple[torch.Tensor, ...]]
_Function = Callable[[Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def bucket_of(rows: int) -> int:
    """The least bucket that `rows`, 1 to `MAX_ROWS`, fit in."""
    spacing = next(spacing for limit, spacing in SPACING if rows <= limit)
    return -(-rows // spacing) * spacing


class Graph:
    """A function of tensors: inputs that stay where they are, and the graph from them to the outputs.

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
        """`function` reads `inputs`. It is captured when `run` finds that `compiler` leaves the device free.

        Graphs of one `pool` share their memory: they must never run at the same time.
        """
        self._name = name
        #: The GPU's memory in bytes, at most, while it was captured, all else included.
        self.peak = 0
        self._function = function
        self._inputs = inputs
        self._pool = pool
        self._compiler = compiler
        self._graph: Any = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def run(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for `values`, on the current stream; the next run of the same pool overwrites them.

        Values may be shorter than the inputs. What lies beyond them is computed as well, and of no interest.
        Raises what torch raises when it does not fit in memory.
        """
        for room, value in zip(self._inputs, values, strict=True):
            room[: len(value)].copy_(value, non_blocking=True)
        if self._graph is None:
            if not self._compiler.device.acquire(blocking=False):
                return self._function()
            try:
                self._capture()
            finally:
                self._compiler.device.release()
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
        # Other threads may use the device meanwhile: they step or decode, or encode texts.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._outputs = self._function()
        self._graph = graph
        self.peak = torch.cuda.max_memory_allocated()
        logger.info(
            "captured %s in %.1f s; GPU memory: %.2f GiB at most, %.2f GiB held",
            self._name,
            time.monotonic() - started_s,
            self.peak / 2**30,
            torch.cuda.memory_reserved() / 2**30,
        )


class Graphs:
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

        `make` is asked for its function and inputs when it is new.

        Raises what torch raises when it does not fit in memory.
        """
        try:
            if name not in self._graphs:
                self._graphs[name] = Graph(name, *make(), self._pool, self._compiler)
            return self._graphs[name].run(values)
        except Exception:
            # A capture that fails leaves its memory in the pool, where only captures find it: all begin anew.
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()
            raise

    @property
    def peaks(self) -> dict[str, int]:
        """The GPU's memory in bytes, at most, while each was captured, all else included."""
        return {name: graph.peak for name, graph in list(self._graphs.items()) if graph.peak}


class StepGraphs:
    """A graph of the compiled step for each lane and bucket. Used by one thread, but for what compiles.

    `at_once` batches are replayed side by side, each by a graph of its own on a stream of its own.
    """

    def __init__(self, unet: Any, compiler: Compiler, *, at_once: int = 1) -> None:
        self._lanes: CompiledLanes[_Function] = CompiledLanes(
            "step", functools.partial(denoise, unet), compiler
        )
        self._graphs = [Graphs(compiler) for _ in range(at_once)]
        self._streams = [torch.cuda.Stream() for _ in range(at_once)] if at_once > 1 else []

    @property
    def peaks(self) -> dict[str, int]:
        """The GPU's memory in bytes, at most, in a step of each bucket so far, weights included."""
        return self._graphs[0].peaks

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
            return [self._step(function, batch, self._graphs[0]) for batch in batches]
        here = torch.cuda.current_stream()
        steps = []
        at_once = len(self._streams)
        for start in range(0, len(batches), at_once):
            together = batches[start : start + at_once]
            for batch, graphs, stream in zip(together, self._graphs, self._streams, strict=False):
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    steps.append(self._step(function, batch, graphs))
            for stream in self._streams:
                here.wait_stream(stream)
        return steps

    def _step(self, function: _Function, batch: Batch, graphs: Graphs) -> Step:
        jobs, rows = len(batch.states), bucket_of(len(batch.job_of_row))
        # What is computed once for each job costs half as much where all of them are guided. Compiled code
        # takes two or more.
        room = max(2, rows // 2)
        if jobs > room:
            room = rows
        name = f"{rows} rows of {room} jobs, {'x'.join(str(side) for side in batch.states.shape[2:])}"

        def make() -> tuple[Captured, Sequence[torch.Tensor]]:
            inputs = batch.room_for(room, rows)
            return lambda: function(inputs), inputs.tensors()

        # Tensors of its own: the next step writes over the graph's.
        return Step(*(output[:jobs].clone() for output in graphs.run(name, make, batch.tensors())))


def _example(batch: Batch) -> tuple[Batch, list[torch.Tensor]]:
    """A batch like `batch`, of no particular number of jobs and rows."""
    example = batch.room_for(jobs=4, rows=6)
    return example, example.tensors()
