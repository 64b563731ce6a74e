"""Another process that compiles into the folder of this one, so that this one need not stop for it.

Compiling is minutes of Python, which only one thread of a process runs at a time. The other process loads the
same model with the same settings on the same GPU, and compiles what it is asked to. What it leaves in the
folder of kernels is found there by the same compilation in this process, which then takes seconds.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from worker.contract.settings import WorkerSettings
from worker.device.compiling.claims import Store, is_ending
from worker.device.compiling.compiler import Compiler, keep_kernels_in
from worker.device.compiling.kernel_cache import KernelCache, Signed
from worker.model import gpu_memory

logger = logging.getLogger("smallcat.engine")

#: Bytes that the other process takes beside its weights, and the share of the GPU's memory that is left free
#: for this one's batches.
WORKING_BYTES, SPARE_SHARE = 4 << 30, 0.2
#: How it is started: anew, for a copy of this process could not use the GPU.
METHOD: Literal["spawn", "fork"] = "spawn"
#: How often it is started for one function, at most.
STARTS = 2
#: Seconds that it may take for one function, between two looks at whether it has answered, and to end.
MOST_S, TICK_S, END_S = 1_800.0, 1.0, 5.0

#: What the other process runs, which finds it by its name: its end of the connection, the worker's settings,
#: and the number of its GPU.
Serve = Callable[[Connection, WorkerSettings, int], None]


def compiler_of(
    settings: WorkerSettings,
    device: torch.device,
    setup: Callable[[], str],
    *,
    serve: Serve | None,
    shared: Store | None = None,
) -> Compiler:
    """The compiler of a runner. `setup`: what its code depends on, as a name.

    `serve`: what another process runs that helps it; None: it has no help. `shared`: where the fleet keeps
    its code; None: nowhere.
    """
    keep_kernels_in(settings.cache_folder / "kernels")
    elsewhere = None
    if serve is not None:
        elsewhere = CompileProcess(settings, device, cache_of(settings, setup, shared), serve)
    return Compiler(device, exact=settings.exact, elsewhere=elsewhere)


def cache_of(settings: WorkerSettings, setup: Callable[[], str], shared: Store | None) -> KernelCache:
    """What was compiled before, on this machine and in the fleet, once `compiler_of` was called."""
    keys = [key.encode() for key in settings.kernel_cache_key.split()]
    signed = Signed(shared, keys) if shared is not None and keys else None
    return KernelCache(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]), setup, signed)


class CompileError(Exception):
    """Raised when a function does not compile."""


class CompileProcess:
    """A `worker.device.compiling.compiler.Elsewhere`. Used by one thread, which it makes wait.

    The process is started when it is needed, and ended when there is nothing left to do: it takes as much of
    the GPU's memory as the model. One that dies is started once more; one that does not answer is ended.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        device: torch.device,
        cache: KernelCache,
        serve: Serve,
    ) -> None:
        """`settings`: those of this process. `device`: its GPU. `cache`: what was compiled before.

        `serve`: what the other process runs.
        """
        # What compiles signs nothing.
        self._settings = settings.model_copy(update={"kernel_cache": "", "kernel_cache_key": ""})
        self._device, self._cache, self._serve = device, cache, serve
        self._process: Any = None
        self._connection: Connection | None = None

    def find(self, what: str, lane: str) -> str | None:
        """See `Elsewhere`."""
        return self._cache.find(what, lane)

    def lose(self, what: str, lane: str) -> None:
        """See `Elsewhere`."""
        self._cache.lose(what, lane)

    def compile(
        self, what: str, lane: str, argument: Any, dynamic: Sequence[torch.Tensor]
    ) -> tuple[str, str]:
        """See `Elsewhere`. Empty: it cannot be done, for a reason that is logged."""
        if (trace := self._cache.wait_for_others(what, lane)) is not None:
            return "by another worker", trace
        if is_ending():
            raise CompileError("the worker ends")
        try:
            return self._compile(what, lane, argument, dynamic)
        finally:
            self._cache.end_claim(what, lane)

    def _compile(
        self, what: str, lane: str, argument: Any, dynamic: Sequence[torch.Tensor]
    ) -> tuple[str, str]:
        # As bytes: tensors would go by a handle to this process' memory.
        question = pickle.dumps((what, lane, argument, dynamic))
        for _ in range(STARTS):
            if self._connection is None and (problem := self._start()):
                logger.info(
                    "Compiling goes on in the worker itself, which then serves fewer jobs: %s", problem
                )
                return "", ""
            try:
                error, artifacts, trace = self._answer(question, what, lane)
            except _DiedError as died:
                logger.warning("The process that compiles has ended: %s", died)
                self.rest()
                continue
            if error:
                raise CompileError(error)
            self._cache.keep(what, lane, artifacts, trace)
            return "by another process", trace
        raise CompileError(f"the process that compiles has ended {STARTS} times, see above")

    def rest(self) -> None:
        """End the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.terminate()
            self._process.join(END_S)
            # It may hang where no signal but this one reaches it.
            self._process.kill()
            self._process.join()
            self._process = None

    def _answer(self, question: bytes, what: str, lane: str) -> tuple[str, bytes, str]:
        """What the process says: its error, empty if there is none, the code, and the trace.

        Raises `_DiedError`, `CompileError`.
        """
        connection, until_s = self._connection, time.monotonic() + MOST_S
        assert connection is not None  # noqa: S101 - it was started
        try:
            connection.send_bytes(question)
            while not connection.poll(TICK_S):
                is_late = time.monotonic() > until_s
                if is_late or is_ending():
                    self.rest()
                    why = f"it was not compiled after {MOST_S:.0f} s" if is_late else "the worker ends"
                    raise CompileError(why)
                self._cache.renew_claim(what, lane)
            answer = connection.recv_bytes()
        except (EOFError, OSError) as ended:
            self._process.join(END_S)
            raise _DiedError(f"exit code {self._process.exitcode} ({ended!r})") from ended
        try:
            error, artifacts, trace = pickle.loads(answer)  # noqa: S301 - our own process
            if not (isinstance(error, str) and isinstance(artifacts, bytes) and isinstance(trace, str)):
                raise TypeError(f"{type(error)}, {type(artifacts)}, {type(trace)}")
        except Exception as wrong:
            raise _DiedError(f"its answer of {len(answer):,} bytes cannot be read ({wrong!r})") from wrong
        return error, artifacts, trace

    def _start(self) -> str:
        """Start the process. Returns why not, in a sentence."""
        free, needed = self._memory()
        if free < needed:
            return (
                f"another process needs {needed / 2**30:.1f} GiB of the GPU, and {free / 2**30:.1f} are free."
            )
        context: Any = multiprocessing.get_context(METHOD)
        self._connection, theirs = context.Pipe()
        settings = self._settings
        if settings.gpu_memory:
            # A part of what this process is allowed, which still needs the rest.
            size = free - int(SPARE_SHARE * gpu_memory.all_of(self._device))
            settings = settings.model_copy(update={"gpu_memory": f"{size}B"})
        arguments = (theirs, settings, self._device.index or 0)
        self._process = context.Process(target=self._serve, args=arguments, name="compile", daemon=True)
        self._process.start()
        theirs.close()
        return ""

    def _memory(self) -> tuple[int, int]:
        """Bytes of the GPU's memory that are free, and that must be."""
        needed = torch.cuda.memory_allocated(self._device) + WORKING_BYTES
        spare = int(SPARE_SHARE * gpu_memory.all_of(self._device))
        return gpu_memory.room(self._device), needed + spare


class _DiedError(Exception):
    """Raised when the process is gone, or says what nobody understands."""
