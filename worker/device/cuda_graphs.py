"""Functions of tensors as CUDA graphs: captured when first used, then replayed.

A graph's shapes are fixed, so a batch is padded to one of the captured batch sizes. A replay runs no Python
of the model and compiles nothing: one launch is the whole step, from the latents through model, guidance and
scheduler to the next latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from worker.contract.errors import first_line
from worker.device.compiling.compiler import CompiledLanes, Compiler, Piece
from worker.device.family import Lane, lane_name
from worker.device.step import Batch, Fields, Forward, Step, denoise_all, with_kept
from worker.model import gpu_memory

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
#: The step of a batch in which no job keeps anything of its image.
_Function = Callable[[Batch], Fields]


def captured_below(rows: int) -> int:
    """The largest captured batch size of at most `rows`, >= 1; of fewer than the smallest `rows` itself."""
    return max((size for size in range(1, rows + 1) if batch_size(min(size, MAX_ROWS)) == size), default=rows)


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
        pool: Pool,
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
        self._runs = 0
        self._graph: Any = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def run(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for `values`, on the current stream. The next run of the same pool overwrites them.

        Values may be shorter than the inputs. The outputs beyond their length have no meaning.
        While jobs are served, the first runs are the warm-ups: a capture then only records.
        Raises what torch raises when it does not fit in memory.
        """
        for padded, value in zip(self._inputs, values, strict=True):
            padded[: len(value)].copy_(value, non_blocking=True)
        if self._graph is None:
            self._runs += 1
            is_cold = self._compiler.is_serving and self._runs <= WARM_UPS
            if is_cold or not self._compiler.device_sync_lock.acquire(blocking=False):
                return self._function()
            try:
                self._capture(warm_ups=max(0, WARM_UPS + 1 - self._runs))
            finally:
                self._compiler.device_sync_lock.release()
        self._graph.replay()
        return self._outputs

    def _capture(self, *, warm_ups: int) -> None:
        started_s = time.monotonic()
        torch.cuda.reset_peak_memory_stats()
        if warm_ups:
            torch.cuda.synchronize()
            with torch.cuda.stream(self._pool.stream):
                for _ in range(warm_ups):
                    self._function()
            self._pool.stream.synchronize()
        self._graph = self._recorded()
        self.peak = torch.cuda.max_memory_allocated()
        logger.info(
            "captured a CUDA graph for %s in %.3f s; GPU memory: %.2f GiB at most, %.2f GiB held",
            self._name,
            time.monotonic() - started_s,
            self.peak / 2**30,
            torch.cuda.memory_reserved() / 2**30,
        )

    def _recorded(self) -> Any:
        """A graph of the function, which is not run.

        As `torch.cuda.graph` makes one, but without its synchronization and its collection of garbage, each
        of which would hold up the jobs that are served.
        """
        _make_room()
        graph = torch.cuda.CUDAGraph()
        with _no_collections(), torch.cuda.stream(self._pool.stream):
            # Other threads may use the device during the capture: they run steps, decode or encode texts.
            graph.capture_begin(pool=self._pool.handle, capture_error_mode="thread_local")
            try:
                self._outputs = self._function()
            except BaseException:
                # It raises too, of a capture that is invalid now.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph


class Pool:
    """Memory that graphs share, and the stream that they are captured on."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """One for all captures: memory is kept by stream, and they would share none."""
        return torch.cuda.Stream()


def _make_room() -> None:
    """Give memory back to the GPU that torch keeps for later, where a capture may need it.

    Not otherwise: it takes a while, and the device waits for it.
    """
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if kept > gpu_memory.room():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage is collected: during a capture, freeing what belongs to the GPU may break it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class GraphPool:
    """Graphs that share their memory, by name. Used by one thread; they must never run at the same time."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._graphs: dict[str, Graph] = {}
        self._pool = Pool()

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
            self.clear()
            raise

    def clear(self) -> None:
        """Drop all graphs. None of them may be running."""
        self._graphs.clear()
        self._pool = Pool()

    def taken_out(self, kinds: Collection[str]) -> list[Graph]:
        """Take the graphs of these kinds out of the pool: their names end with one."""
        names = [name for name in self._graphs if any(name.endswith(f" with {kind}") for kind in kinds)]
        graphs = [self._graphs.pop(name) for name in names]
        if graphs and not self._graphs:
            # Its memory is free when the last of them is gone.
            self._pool = Pool()
        return graphs

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
        plain = partial(denoise_all, forward)
        self._lanes: CompiledLanes[_Function] = CompiledLanes("step", plain, compiler)
        #: What serves until a lane is compiled.
        self._plain = PlainGraphs(plain, compiler) if compiler.in_background else None
        self._pools = [GraphPool(compiler) for _ in range(at_once)]
        self._streams = [torch.cuda.Stream() for _ in range(at_once)] if at_once > 1 else []
        #: Rows that batches had beside those of jobs so far.
        self.padded_rows = 0
        #: Whether the last step was compiled.
        self.was_compiled = False

    @property
    def lanes(self) -> CompiledLanes[_Function]:
        """The compiled step."""
        return self._lanes

    @property
    def peaks(self) -> dict[str, int]:
        """Most bytes of the GPU's memory in a step of each batch size so far, weights included, by name."""
        return self._pools[0].peaks

    def compile(self, lane: Lane, batch: Batch) -> bool:
        """Compile `lane` now, for batches like `batch`. Returns whether that worked."""
        return self.piece(lane, batch).compile_now()

    def piece(self, lane: Lane, batch: Batch) -> Piece:
        """What is compiled of `lane`, for batches like `batch`."""
        return Piece(self._lanes, _name(lane, batch), lambda: _example(batch))

    def run(self, lane: Lane, batches: Sequence[Batch]) -> list[Step | None]:
        """The step of each batch, replayed. None where its kind is not compiled; this call may begin to.

        Raises what torch raises, its out-of-memory included, when a new batch size cannot be captured.
        """
        kinds = {_name(lane, batch): batch for batch in batches}
        functions = {name: self._lanes.get(name, partial(_example, batch)) for name, batch in kinds.items()}
        self.was_compiled = all(functions.values())
        if self._plain is not None:
            self._plain.drop({name for name, function in functions.items() if function is not None})
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
        if batch.loras is not None and batch.loras.needs_loop:
            return None
        padded = _Padded(lane, batch)
        if (function := functions[padded.kind]) is None:
            step = self._plain.run(padded) if self._plain is not None else None
        else:
            step = padded.run(function, pool)
        if step is not None:
            self.padded_rows += padded.more_rows
        return step


class PlainGraphs:
    """Graphs of the uncompiled step, which serve until a lane is compiled.

    A replay asks for Python's lock a hundred times less often than the step itself: so a thread that loads
    compiled code hardly holds it up.
    """

    def __init__(self, function: _Function, compiler: Compiler) -> None:
        self._function = function
        self._pool = GraphPool(compiler)
        #: Graphs that are not used any more, and what is recorded after their last run.
        self._dropped: list[tuple[list[Graph], torch.cuda.Event]] = []
        self._works = True

    def run(self, padded: _Padded) -> Step | None:
        """The step of a batch, replayed. None where that does not work."""
        if not self._works:
            return None
        try:
            return padded.run(self._function, self._pool)
        except Exception as error:  # noqa: BLE001 - the step runs without a graph
            logger.warning("Uncompiled steps run without CUDA graphs: %s", first_line(error))
            self._works = False
            return None

    def drop(self, kinds: Collection[str]) -> None:
        """Drop what was captured of `kinds`, which are compiled now, once their last step has ended."""
        if graphs := self._pool.taken_out(kinds):
            event = torch.cuda.Event()
            event.record()
            self._dropped.append((graphs, event))
        if self._dropped and self._dropped[0][1].query():
            del self._dropped[0]


class _Padded:
    """A batch, and the sizes that it is padded to."""

    def __init__(self, lane: Lane, batch: Batch) -> None:
        jobs, rows = len(batch.states), batch_size(len(batch.job_of_row))
        #: What a function is compiled for.
        self.kind = _name(lane, batch)
        self.more_rows = rows - len(batch.job_of_row)
        # Where all jobs are guided there are half as many jobs as rows, and what is computed once for each
        # job costs half as much. Compiled code takes two jobs or more.
        padded_jobs = max(2, rows // 2)
        if jobs > padded_jobs:
            padded_jobs = rows
        self._name = f"{rows} rows of {padded_jobs} jobs"
        # That is part of the graph and not of what is compiled: the first mask need not wait for a compiler.
        self._name += ", some masked" if batch.kept is not None else ""
        if batch.loras is not None:
            self._name += f", ranks to {len(batch.loras.room)}"
            # The addresses of jobs that are no longer there must not stay in the graph's input.
            batch = dataclasses.replace(batch, loras=batch.loras.padded(padded_jobs))
        self._batch, self._jobs, self._sizes = batch, jobs, (padded_jobs, rows)

    def run(self, function: _Function, pool: GraphPool) -> Step:
        """The step, by a graph of `pool`."""
        padded_jobs, rows = self._sizes

        def make() -> tuple[Captured, Sequence[torch.Tensor]]:
            inputs = self._batch.zeros(padded_jobs, rows)
            unmasked = inputs.unmasked()
            return lambda: with_kept(function(unmasked), inputs), inputs.tensors()

        name = f"{self._name} with {self.kind}"
        # Clones, because the graph's next replay overwrites its outputs.
        return Step(*(output[: self._jobs].clone() for output in pool.run(name, make, self._batch.tensors())))


def _name(lane: Lane, batch: Batch) -> str:
    """What a function is compiled for: all shapes but the numbers of jobs and rows."""
    return f"{batch.kind}, {lane_name(lane)}"


def _example(batch: Batch) -> tuple[Batch, list[torch.Tensor]]:
    """A batch like `batch`, whose numbers of jobs and rows are dynamic."""
    example = batch.unmasked().zeros(jobs=4, rows=6)
    return example, example.tensors()
