"""Another process that compiles into the folder of this one, so that this one need not stop for it.

Compiling is minutes of Python, which only one thread of a process runs at a time. The other process loads the
same model with the same settings on the same GPU, and compiles what it is asked to. What it leaves in the
folder of kernels is found there by the same compilation in this process, which then takes seconds.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from worker.contract.settings import WorkerSettings
from worker.device.compiling.compiler import Compiler, keep_kernels_in
from worker.device.compiling.kernel_cache import Folder, KernelCache, Signed

logger = logging.getLogger("smallcat.engine")

#: Bytes that the other process takes beside its weights, and the share of the GPU's memory that is left free
#: for this one's batches.
WORKING_BYTES, SPARE_SHARE = 4 << 30, 0.2


def compiler_of(
    settings: WorkerSettings, device: torch.device, setup: Callable[[], str], *, alone: bool
) -> Compiler:
    """The compiler of a runner. `setup`: what its code depends on, as a name. `alone`: it has no help."""
    keep_kernels_in(settings.cache_folder / "kernels")
    elsewhere = None
    if not alone:
        shared = None
        if settings.kernel_cache and settings.kernel_cache_key:
            keys = [key.encode() for key in settings.kernel_cache_key.split()]
            shared = Signed(Folder(Path(settings.kernel_cache).expanduser()), keys)
        cache = KernelCache(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]), setup, shared)
        elsewhere = CompileProcess(settings, device, cache)
    return Compiler(device, exact=settings.exact, elsewhere=elsewhere)


class CompileError(Exception):
    """Raised when a function does not compile."""


class CompileProcess:
    """A `worker.device.compiling.compiler.Elsewhere`. Used by one thread, which it makes wait.

    The process is started when it is needed, and ended when there is nothing left to do: it takes as much of
    the GPU's memory as the model.
    """

    def __init__(self, settings: WorkerSettings, device: torch.device, cache: KernelCache) -> None:
        """`settings`: those of this process. `device`: its GPU. `cache`: what was compiled before."""
        self._settings, self._device, self._cache = settings, device, cache
        self._process: Any = None
        self._connection: Connection | None = None

    def compile(
        self, what: str, lane: str, argument: Any, dynamic: Sequence[torch.Tensor]
    ) -> tuple[str, str]:
        """See `Elsewhere`. Empty: it cannot be done, for a reason that is logged."""
        if (trace := self._cache.find(what, lane)) is not None:
            return "found", trace
        if self._connection is None and (problem := self._start()):
            logger.info("Compiling goes on in the worker itself, which then serves fewer jobs: %s", problem)
            return "", ""
        assert self._connection is not None  # noqa: S101 - it was started
        try:
            # As bytes: tensors would go by a handle to this process' memory.
            self._connection.send_bytes(pickle.dumps((what, lane, argument, dynamic)))
            error, artifacts, trace = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - our own process
        except (EOFError, OSError) as ended:
            logger.warning("The process that compiles has ended (%r): the worker itself compiles.", ended)
            self.rest()
            return "", ""
        if error:
            raise CompileError(error)
        self._cache.keep(what, lane, artifacts, trace)
        return "by another process", trace

    def rest(self) -> None:
        """End the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process = None

    def _start(self) -> str:
        """Start the process. Returns why not, in a sentence."""
        free, total = torch.cuda.mem_get_info(self._device)
        needed = torch.cuda.memory_allocated(self._device) + WORKING_BYTES + int(SPARE_SHARE * total)
        if free < needed:
            return (
                f"another process needs {needed / 2**30:.1f} GiB of the GPU, and {free / 2**30:.1f} are free."
            )
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self._settings, self._device.index or 0)
        self._process = context.Process(target=_serve, args=arguments, name="compile", daemon=True)
        self._process.start()
        theirs.close()
        return ""


def _serve(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    # By name: it imports the runner, which imports this module.
    importlib.import_module("worker.device.compiling.server").serve(connection, settings, gpu)
