"""torch.compile by lane: on a thread of its own, while the plain function serves.

Compiling takes about a minute the first time and seconds after that, from the folder that `keep_kernels_in`
names. The compiled code of a lane serves any number of rows from 2 on, and is never compiled again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from worker.contract.errors import first_line

logger = logging.getLogger("smallcat.engine")

#: Calls of a lane before it is worth compiling: about one picture of 50 steps.
WORTH_COMPILING = 50

#: Seconds that a thread may keep Python to itself while another one waits for it and something compiles. That
#: is a minute of nothing but Python: at Python's own 5 ms the engine's thread, which asks for it a hundred
#: times a step, would hardly go on. At other times handing it over often costs more than it gives
#: (docs/performance.md).
SWITCH_S = 0.0005

F = TypeVar("F", bound=Callable[..., Any])
#: Makes an argument of a function, and names the tensors in it whose first dimension may be of any length
#: from 2 on.
Example = Callable[[], tuple[Any, Sequence[torch.Tensor]]]


def keep_kernels_in(folder: Path) -> None:
    """Let torch keep what it compiles in `folder`, where it would keep it in a temporary one.

    A folder that the user has chosen by torch's own variable stays. To be called before anything compiles.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


class Compiler:
    """The one thread that compiles, for one GPU."""

    def __init__(self, device: torch.device, *, exact: bool) -> None:
        """`exact`: the same bits at every start, and from a worker's first picture to its last.

        So nothing is compiled for which the plain function has served already.
        """
        # Not at the top: a CPU compiles nothing, and should not wait for them.
        import torch._dynamo.config
        import torch._inductor.config

        self.in_background = not exact
        #: Held while somebody may wait for the whole device, as compiling does to time its kernels: nobody
        #: may while a CUDA graph is captured, which begins with such waiting itself.
        self.device = threading.Lock()
        # A thread starts with the first GPU as its own.
        self.thread = ThreadPoolExecutor(1, "compiler", torch.cuda.set_device, (device,))
        # What is fastest here and now may round otherwise than at the next start: then nothing is tried.
        torch._inductor.config.deterministic = exact
        # Dynamo gives a function up that has been compiled this often; each lane counts.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.accumulated_recompile_limit = 4096


class CompiledLanes(Generic[F]):
    """One function, compiled for each lane that is worth it. Called from one thread."""

    def __init__(self, what: str, function: F, compiler: Compiler) -> None:
        self._what, self._function, self._compiler = what, function, compiler
        self._calls: Counter[Hashable] = Counter()
        self._futures: dict[Hashable, Future[F]] = {}

    def get(self, lane: Hashable, example: Example) -> F | None:
        """The function compiled for `lane`; None: not yet. This call may set it off, with `example`."""
        if (future := self._futures.get(lane)) is None:
            self._calls[lane] += 1
            if self._calls[lane] >= WORTH_COMPILING and self._compiler.in_background:
                self._start(lane, example)
            return None
        return future.result() if future.done() and not future.exception() else None

    def compile_now(self, lane: Hashable, example: Example) -> bool:
        """Compile for `lane` and wait for it; whether it worked. What keeps it from working is logged."""
        return self._start(lane, example).exception() is None

    def _start(self, lane: Hashable, example: Example) -> Future[F]:
        argument, dynamic = example()
        future = self._futures[lane] = self._compiler.thread.submit(self._compile, lane, argument, dynamic)
        return future

    def _compile(self, lane: Hashable, argument: Any, dynamic: Sequence[torch.Tensor]) -> F:
        started_s = time.monotonic()
        try:
            with torch.no_grad():
                for tensor in dynamic:
                    torch._dynamo.mark_dynamic(tensor, 0)
                # Sizes of other lanes are compiled apart: fixed ones give the better kernels.
                compiled = cast(F, torch.compile(self._function, fullgraph=True, dynamic=False))
                with self._compiler.device, _giving_way():
                    compiled(argument)
                    torch.cuda.synchronize()
        except Exception as error:
            logger.warning("The %s of %s stays uncompiled: %s", self._what, lane, first_line(error))
            raise
        logger.info("compiled the %s of %s in %.0f s", self._what, lane, time.monotonic() - started_s)
        return compiled


@contextlib.contextmanager
def _giving_way() -> Iterator[None]:
    """Let the other threads of this process go on beside what needs Python all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
