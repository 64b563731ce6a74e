"""torch.compile for each lane, on a thread of its own, while the uncompiled function serves.

The first time, compiling takes about a minute. After that it takes seconds, with the kernels kept in the
folder that `keep_kernels_in` names. The compiled code of a lane serves any number of rows from 2 on, without
recompiling.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from worker.contract.errors import first_line

logger = logging.getLogger("smallcat.engine")

#: Calls of a lane before it is compiled: about one picture of 50 steps.
CALLS_BEFORE_COMPILING = 50

#: Python's switch interval (`sys.setswitchinterval`) while something compiles, in seconds: how long a thread
#: holds the interpreter's lock while another one waits for it. Compiling is a minute of nothing but Python.
#: With Python's own 5 ms the engine's thread, which asks for the lock a hundred times a step, would hardly
#: advance. At other times a short interval costs more than it gains (docs/performance.md).
SWITCH_S = 0.0005

F = TypeVar("F", bound=Callable[..., Any])
#: Makes an argument of a function. Returns it with the tensors in it whose first dimension is dynamic: of any
#: length from 2 on.
Example = Callable[[], tuple[Any, Sequence[torch.Tensor]]]


def keep_kernels_in(folder: Path) -> None:
    """Let torch keep compiled kernels in `folder` instead of a temporary one.

    Call it before anything compiles. A folder that the user has chosen by TORCHINDUCTOR_CACHE_DIR stays.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


class Compiler:
    """The one thread that compiles, for one GPU."""

    def __init__(self, device: torch.device, *, exact: bool) -> None:
        """`exact`: the same bits at every start, and from a worker's first picture to its last.

        So a lane that the uncompiled function has served is not compiled later.
        """
        # Not at the top: they take long to import, and a CPU compiles nothing.
        import torch._dynamo.config
        import torch._inductor.config

        #: Whether a lane that is used often may be compiled while the uncompiled function serves it.
        self.in_background = not exact
        #: Held by whoever synchronizes the whole device: compiling does, to time kernels, and so does the
        #: beginning of a CUDA graph's capture. A synchronization during a capture would break it.
        self.device_sync_lock = threading.Lock()
        # A new thread's current device is the first GPU, not this one.
        self.thread = ThreadPoolExecutor(1, "compiler", torch.cuda.set_device, (device,))
        # Kernels that are chosen by timing may differ, and round differently, from one start to the next.
        torch._inductor.config.deterministic = exact
        # Dynamo compiles no function more often than this; each lane counts.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.accumulated_recompile_limit = 4096


class CompiledLanes(Generic[F]):
    """One function, compiled for each lane that is used often. Called from one thread.

    A lane is given by its name in the log.
    """

    def __init__(self, what: str, function: F, compiler: Compiler) -> None:
        """`what`: the function's name in the log."""
        self._what, self._function, self._compiler = what, function, compiler
        self._calls: Counter[str] = Counter()
        self._futures: dict[str, Future[F]] = {}

    def get(self, lane: str, example: Example) -> F | None:
        """The function compiled for `lane`. None while it is not; this call may begin to compile it."""
        if (future := self._futures.get(lane)) is None:
            self._calls[lane] += 1
            if self._calls[lane] >= CALLS_BEFORE_COMPILING and self._compiler.in_background:
                self._start(lane, example)
            return None
        return future.result() if future.done() and not future.exception() else None

    def compile_now(self, lane: str, example: Example) -> bool:
        """Compile `example` for `lane` and wait for it. Returns whether that worked; a failure is logged."""
        return self._start(lane, example).exception() is None

    def _start(self, lane: str, example: Example) -> Future[F]:
        argument, dynamic = example()
        future = self._futures[lane] = self._compiler.thread.submit(self._compile, lane, argument, dynamic)
        return future

    def _compile(self, lane: str, argument: Any, dynamic: Sequence[torch.Tensor]) -> F:
        started_s = time.monotonic()
        try:
            with torch.no_grad():
                for tensor in dynamic:
                    torch._dynamo.mark_dynamic(tensor, 0)
                # All other sizes are fixed, and each lane is compiled for its own: kernels are faster so.
                compiled = cast(F, torch.compile(self._function, fullgraph=True, dynamic=False))
                with self._compiler.device_sync_lock, _short_switch_interval():
                    compiled(argument)
                    torch.cuda.synchronize()
        except Exception as error:
            logger.warning(
                "The %s for %s does not compile and stays uncompiled: %s",
                self._what,
                lane,
                first_line(error),
            )
            raise
        logger.info("compiled the %s for %s in %.0f s", self._what, lane, time.monotonic() - started_s)
        return compiled


@contextlib.contextmanager
def _short_switch_interval() -> Iterator[None]:
    """Let the other threads of this process advance beside one that runs Python all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
