"""torch.compile for each lane, on a thread of its own, while the uncompiled function serves.

The first time, compiling takes minutes, and another process does it (`worker.device.compiling.process`): in
this one it would hold Python's lock. After that it takes seconds, with the kernels kept in the folder that
`keep_kernels_in` names. The compiled code of a lane serves any number of rows from 2 on, without recompiling.
"""

from __future__ import annotations

import contextlib
import copyreg
import gc
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from worker.contract.errors import first_line
from worker.device.compiling import traced
from worker.device.compiling.traced import Recorder, Trace

logger = logging.getLogger("smallcat.engine")

#: Calls of a lane before it is compiled: about one picture of 50 steps.
CALLS_BEFORE_COMPILING = 50

#: Python's switch interval (`sys.setswitchinterval`) while something compiles, in seconds: how long a thread
#: holds the interpreter's lock while another one waits for it. Compiling is a minute of nothing but Python.
#: With Python's own 5 ms the engine's thread, which asks for the lock a hundred times a step, would hardly
#: advance. At other times a short interval costs more than it gains (docs/performance.md).
SWITCH_S = 0.0005

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
#: Makes an argument of a function. Returns it with the tensors in it whose first dimension is dynamic: of any
#: length from 2 on.
Example = Callable[[], tuple[Any, Sequence[torch.Tensor]]]


def keep_kernels_in(folder: Path) -> None:
    """Let torch keep compiled kernels in `folder` instead of a temporary one.

    Call it before anything compiles. A folder that the user has chosen by TORCHINDUCTOR_CACHE_DIR stays.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def memory_format(name: str) -> torch.memory_format:
    """The one that torch has under this name."""
    found: torch.memory_format = getattr(torch, name)
    return found


def _reduced(value: torch.memory_format) -> tuple[Callable[[str], torch.memory_format], tuple[str]]:
    """How it is pickled. Torch's keys of compiled code are hashes of pickles.

    Of itself pickle names the first module of all that were imported in which it finds `torch`, so that
    programs that import in another order would not find each other's code.
    """
    return memory_format, (str(value).removeprefix("torch."),)


class Elsewhere(Protocol):
    """Compiles in another process, into the folder that this one reads: `CompileProcess`."""

    def find(self, what: str, lane: str) -> str | None:
        """The `traced.Trace` of what was compiled before, here or in the fleet; it is here then.

        Empty: it has none. None: there is nothing.
        """

    def lose(self, what: str, lane: str) -> None:
        """What was found does not load: it is to be compiled again."""

    def compile(
        self, what: str, lane: str, argument: Any, dynamic: Sequence[torch.Tensor]
    ) -> tuple[str, str]:
        """Have the function called `what` compiled, as `CompiledLanes` does, unless another worker does.

        Returns how, to end a sentence, empty where it was not done; and its `traced.Trace` as text, empty
        where it has none. Raises `CompileError` where the function does not compile.
        """

    def rest(self) -> None:
        """Nothing more is to be compiled for now."""


class Compiler:
    """The one thread that compiles, for one GPU."""

    def __init__(self, device: torch.device, *, exact: bool, elsewhere: Elsewhere | None = None) -> None:
        """`exact`: the same bits at every start, and from a worker's first picture to its last.

        So a lane that the uncompiled function has served is not compiled later. `elsewhere`: compiles what
        this process then only loads; None: this process compiles all itself.
        """
        # Not at the top: they take long to import, and a CPU compiles nothing.
        import torch._dynamo.config
        import torch._inductor.config

        #: Whether a lane that is used often may be compiled while the uncompiled function serves it.
        self.in_background = not exact
        #: Whether jobs may be waiting, so that nothing may hold a step up.
        self.is_serving = False
        #: Held by whoever synchronizes the whole device: compiling does, to time kernels, and so does the
        #: beginning of a CUDA graph's capture. A synchronization during a capture would break it.
        self.device_sync_lock = threading.Lock()
        self.elsewhere = elsewhere
        #: Compilations that have not ended.
        self._left = 0
        self._counting = threading.Lock()
        # A new thread's current device is the first GPU, not this one.
        self._thread = ThreadPoolExecutor(1, "compiler", torch.cuda.set_device, (device,))
        # Kernels that are chosen by timing may differ, and round differently, from one start to the next.
        torch._inductor.config.deterministic = exact
        copyreg.pickle(torch.memory_format, _reduced)
        # Dynamo compiles no function more often than this; each lane counts.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.accumulated_recompile_limit = 4096

    def submit(self, call: Callable[..., R], *arguments: Any) -> Future[R]:
        """Call it on the thread, after all that was submitted before."""
        with self._counting:
            self._left += 1
        return self._thread.submit(self._run, call, *arguments)

    def _run(self, call: Callable[..., R], *arguments: Any) -> R:
        try:
            return call(*arguments)
        finally:
            with self._counting:
                self._left -= 1
                is_last = not self._left
            if is_last and self.elsewhere is not None:
                self.elsewhere.rest()


class CompiledLanes(Generic[F]):
    """One function, compiled for each lane that is used often. Called from one thread.

    A lane is given by its name in the log.
    """

    def __init__(self, what: str, function: F, compiler: Compiler, *, calls: int | None = None) -> None:
        """`calls`: of a lane before it is compiled; None: `CALLS_BEFORE_COMPILING`."""
        #: The function's name in the log.
        self.what = what
        self._least_calls = calls or CALLS_BEFORE_COMPILING
        self._function, self._compiler = function, compiler
        self._calls: Counter[str] = Counter()
        #: What is compiled, or will be.
        self._begun: set[str] = set()
        #: None: what was to be loaded is not there, or does not load.
        self._futures: dict[str, Future[F | None]] = {}

    def get(self, lane: str, example: Example) -> F | None:
        """The function compiled for `lane`. None while it is not; this call may begin to compile it."""
        if (future := self._futures.get(lane)) is None:
            self._calls[lane] += 1
            if self._calls[lane] >= self._least_calls and self._compiler.in_background:
                self.begin(lane, example)
            return None
        return future.result() if future.done() and not future.exception() else None

    def seek(self, lane: str) -> Future[str | None]:
        """Look for what was compiled before, here or in the fleet: see `Elsewhere.find`."""
        elsewhere = self._compiler.elsewhere
        return self._compiler.submit(lambda: elsewhere.find(self.what, lane) if elsewhere else None)

    def load(self, lane: str, example: Example, trace: str) -> Future[bool]:
        """Load what `seek` has found, with its `trace`. Returns whether that worked.

        Where it takes too long to wait for, it goes on beside what is served.
        """
        argument, _ = example()
        future = self._futures[lane] = self._compiler.submit(self._load, lane, argument, trace)
        return self._compiler.submit(lambda: future.exception() is None and future.result() is not None)

    def begin(self, lane: str, example: Example) -> None:
        """Compile `example` for `lane` beside what is served, unless that has begun."""
        if lane not in self._begun and not self._is_compiled(lane):
            self._start(lane, example, beside=True)

    def compile_now(self, lane: str, example: Example) -> bool:
        """Compile `example` for `lane` and wait for it. Returns whether that worked; a failure is logged."""
        future = self._futures.get(lane)
        if future is None or (future.done() and not self._is_compiled(lane)):
            future = self._start(lane, example, beside=False)
        return future.exception() is None

    def _is_compiled(self, lane: str) -> bool:
        future = self._futures.get(lane)
        return bool(future and future.done() and not future.exception() and future.result() is not None)

    def record(self, lane: str, argument: Any, dynamic: Sequence[torch.Tensor]) -> Recorder:
        """Compile for a call with `argument`, as `example` would give it, and note how the code is called.

        Raises what compiling raises.
        """
        recorder = Recorder()
        self._compiler.submit(self._traced, argument, dynamic, recorder).result()
        return recorder

    def _start(self, lane: str, example: Example, *, beside: bool) -> Future[F | None]:
        argument, dynamic = example()
        elsewhere = self._compiler.elsewhere if beside else None
        earlier = self._futures.get(lane)
        self._begun.add(lane)
        future: Future[F | None] = self._compiler.submit(
            self._compile, lane, argument, dynamic, elsewhere, earlier
        )
        self._futures[lane] = future
        return future

    def _load(self, lane: str, argument: Any, trace: str) -> F | None:
        started_s = time.monotonic()
        compiled = self._loaded(lane, argument, trace)
        if compiled is not None:
            seconds = time.monotonic() - started_s
            logger.info("loaded the compiled %s for %s in %.1f s", self.what, lane, seconds)
        elif self._compiler.elsewhere is not None:
            self._compiler.elsewhere.lose(self.what, lane)
        return compiled

    def _compile(
        self,
        lane: str,
        argument: Any,
        dynamic: Sequence[torch.Tensor],
        elsewhere: Elsewhere | None,
        earlier: Future[F | None] | None,
    ) -> F | None:
        # It has ended: this is the only thread that compiles and loads.
        if earlier is not None and not earlier.exception() and (loaded := earlier.result()) is not None:
            return loaded
        started_s = kept_s = time.monotonic()
        how, trace = "", None
        try:
            if elsewhere is not None and (trace := elsewhere.find(self.what, lane)):
                if (compiled := self._load(lane, argument, trace)) is not None:
                    return compiled
                trace = None
            if elsewhere is not None and trace is None:
                how, trace = elsewhere.compile(self.what, lane, argument, dynamic)
                kept_s = time.monotonic()
            compiled = self._loaded(lane, argument, trace) if trace else None
            if compiled is None:
                compiled = self._traced(argument, dynamic)
        except Exception as error:
            logger.warning(
                "The %s for %s does not compile and stays uncompiled: %s",
                self.what,
                lane,
                first_line(error),
            )
            raise
        done_s = time.monotonic()
        if how:
            how = f"{how} in {kept_s - started_s:.1f} s, and loaded in {done_s - kept_s:.1f} s"
        logger.info(
            "compiled the %s for %s: %s", self.what, lane, how or f"here, in {done_s - started_s:.0f} s"
        )
        return compiled

    @torch.no_grad()
    def _loaded(self, lane: str, argument: Any, trace: str) -> F | None:
        """What was compiled before, without tracing. None, and a line in the log: that does not work."""
        try:
            with self._compiler.device_sync_lock, _beside_others():
                compiled = traced.load(Trace.from_json(trace), self._function)
                compiled(argument)
                torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever it is, tracing may do
            logger.warning(
                "The compiled %s for %s does not load and is made anew: %r", self.what, lane, error
            )
            return None
        return cast(F, compiled)

    @torch.no_grad()
    def _traced(self, argument: Any, dynamic: Sequence[torch.Tensor], recorder: Recorder | None = None) -> F:
        # Not at the top, like all that belongs to the compiler.
        from torch._inductor.virtualized import V

        from worker.device.compiling.choices import Choices

        for tensor in dynamic:
            torch._dynamo.mark_dynamic(tensor, 0)
        options: dict[str, Any] = {} if recorder is None else {"backend": recorder}
        # All other sizes are fixed, and each lane is compiled for its own: kernels are faster so.
        function = traced.bound(self._function)
        compiled: Any = torch.compile(function, fullgraph=True, dynamic=False, **options)
        with self._compiler.device_sync_lock, _beside_others(), V.set_choices_handler(Choices()):
            result = compiled(argument)
            torch.cuda.synchronize()
        if recorder is not None:
            recorder.result = result
        return cast(F, compiled)


@dataclass(frozen=True)
class Piece:
    """A function that is compiled, and a lane."""

    lanes: CompiledLanes[Any]
    lane: str
    example: Example
    #: Runs it once, so that the first jobs need not wait for its capture.
    run: Callable[[], object] = lambda: None

    def seek(self) -> Future[str | None]:
        """See `CompiledLanes.seek`."""
        return self.lanes.seek(self.lane)

    def load(self, trace: str) -> Future[bool]:
        """See `CompiledLanes.load`."""
        return self.lanes.load(self.lane, self.example, trace)

    def begin(self) -> None:
        """See `CompiledLanes.begin`."""
        self.lanes.begin(self.lane, self.example)

    def compile_now(self) -> bool:
        """See `CompiledLanes.compile_now`; and run it."""
        if is_compiled := self.lanes.compile_now(self.lane, self.example):
            self.run()
        return is_compiled


@contextlib.contextmanager
def _beside_others() -> Iterator[None]:
    """Let the other threads of this process advance beside one that runs Python all the time.

    What it leaves behind is not collected: a collection stops every thread, for a second.
    """
    before, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(SWITCH_S)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.freeze()
        if collects:
            gc.enable()
