"""The start of a worker's device: what takes long begins at once, side by side. No torch at the top.

    preload(settings)                   while the worker waits for Redis and the bucket
    runner = load(settings, files)

Importing torch and diffusers holds Python's lock most of the time. Hashing the model's files and waking the
GPU with its libraries need no lock: so they run beside the imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from worker.contract.plain_log import escape_logs
from worker.contract.settings import WorkerSettings

if TYPE_CHECKING:
    from worker.device.compiling.claims import Store
    from worker.device.model_runner import ModelRunner
    from worker.model.beside.file_store import FileStore

logger = logging.getLogger("smallcat.engine")

T = TypeVar("T")

_loading_later = threading.RLock()

#: What `preload` has begun, by the settings that it was begun for.
_begun: dict[WorkerSettings, tuple[Future[Any], Future[Any]]] = {}


def preload(settings: WorkerSettings) -> None:
    """Begin what `load` will need. Returns at once; errors are `load`'s to raise."""
    if settings.device != "cpu":
        _beside("wake the GPU", _wake_gpu)
    files = _beside("find the model", lambda: _find(settings))
    _begun[settings] = files, _beside("import", lambda: _import(files))


def load(settings: WorkerSettings, files: FileStore, shared: Store | None = None) -> ModelRunner:
    """The model, on its device, with the files beside it. Raises `SettingsError`.

    `shared`: where the fleet keeps compiled code; None: nowhere.
    """
    if settings not in _begun:
        preload(settings)
    found, imported = _begun.pop(settings)
    imported.result()
    from worker.device.model_runner import ModelRunner
    from worker.model import loader

    return ModelRunner(settings, loader.load(settings, found=found), files=files, shared=shared)


def _beside(what: str, do: Callable[[], T]) -> Future[T]:
    """Do it on a thread of its own, which the process waits for before it ends."""
    future: Future[T] = Future()

    def run() -> None:
        started_s = time.monotonic()
        try:
            future.set_result(do())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)
        logger.debug("start: %s took %.1f s", what, time.monotonic() - started_s)

    # Not a daemon: Python must not end in the middle of an import of torch.
    threading.Thread(target=run, name=what).start()
    return future


def _find(settings: WorkerSettings) -> Any:
    from worker.model import files

    # What `loader` asks for wherever a GPU is found.
    return files.find(settings, half=settings.dtype in ("auto", "fp16") and settings.device != "cpu")


def _import(files: Future[Any]) -> None:
    """Import all that a runner needs."""
    # The imports make half a million objects that live as long as the process. Garbage collections among
    # them take a second, and each later one would stop every thread for longer.
    gc.disable()
    later("scipy.stats")
    try:
        import torch

        # Most of the imports are still to come.
        if torch.cuda.is_available() and torch.cuda.device_count() == 1:
            _beside("wake the kernels", _wake_kernels)
        import diffusers
        import transformers  # noqa: F401

        # These have brought handlers of their own, by which the imports below warn.
        escape_logs()
        import worker.device.model_runner  # noqa: F401

        if files.done() and not files.exception():
            # The pipeline's own modules, and those of its text encoders.
            getattr(diffusers, files.result().pipeline_class)
        if torch.cuda.is_available():
            torch.cuda.init()
    finally:
        gc.freeze()
        gc.enable()


class _Later(types.ModuleType):
    """Stands for a module until something of it is used. Thread-safe."""

    def __getattr__(self, name: str) -> Any:
        # What Python's own import asks for.
        if name.startswith("__"):
            raise AttributeError(name)
        with _loading_later:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
            module = importlib.import_module(self.__name__)
        return getattr(module, name)


def later(module: str) -> None:
    """Import a module only when something of it is used: one that others import for what is rarely used."""
    with contextlib.suppress(ImportError):
        if module not in sys.modules and importlib.util.find_spec(module) is not None:
            sys.modules[module] = _Later(module)


def _wake_kernels() -> None:
    """Load the libraries of products, convolutions and attention beside the imports: it takes a second."""
    import torch

    # Whatever fails here fails again where somebody can do something about it.
    with contextlib.suppress(Exception), torch.no_grad():
        x = torch.zeros(2, 8, 64, 64, device="cuda", dtype=torch.float16)
        torch.nn.functional.conv2d(x.to(memory_format=torch.channels_last), x[:, :, :3, :3].contiguous())
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        x[0, 0] @ x[0, 1]
        torch.nn.functional.group_norm(x, 4)
        torch.cuda.synchronize()


def _wake_gpu() -> None:
    """Initialize CUDA's driver, and the GPU where there is one alone. By ctypes, which holds no lock."""
    # As torch does, which then is too late.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        count, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value == 1:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
