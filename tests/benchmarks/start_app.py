"""The worker that `tests.benchmarks.start` starts: it notes each part of the start, and each step.

It is `worker`'s own app, with pictures in a folder. The environment sets START_AT (Unix time at which the
process was started), START_FOLDER (for the pictures) and START_TRACE (a file of JSON lines).
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import worker.tasks as tasks
from tests.folder_storage import InFolder
from worker.celery import app as app
from worker.device import start
from worker.jobs.handler import JobHandler

_trace = os.open(os.environ["START_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
_started_at = float(os.environ["START_AT"])


def now() -> float:
    """Seconds since the process was started."""
    return time.time() - _started_at


def note(kind: str, **values: Any) -> None:
    os.write(_trace, (json.dumps({"kind": kind, **values}) + "\n").encode())


def timed(owner: Any, name: str, label: str) -> None:
    """Note each call of a function."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        began_s = now()
        try:
            return function(*arguments, **options)
        finally:
            note("part", what=label, began_s=began_s, ended_s=now(), thread=threading.current_thread().name)

    setattr(owner, name, call)


class FolderStorage(InFolder):
    """A folder in the place of the bucket, which needs no check."""

    VARIABLE = "START_FOLDER"

    def check(self) -> tuple[str, ...]:
        return ()


class FirstJob(JobHandler):
    """Notes when the first job is taken."""

    is_first = True

    def handle(self, *arguments: Any, **options: Any) -> Any:
        if FirstJob.is_first:
            FirstJob.is_first = False
            note("event", what="first job taken", at_s=now())
        return super().handle(*arguments, **options)


class Steps:
    """Notes each step of a runner: when it was launched, and how long after the last one it ended."""

    def __init__(self, runner: Any) -> None:
        import torch

        self._events: Callable[[], Any] = functools.partial(torch.cuda.Event, enable_timing=True)
        self._run, self._graphs = runner._run, runner._graphs
        self._waiting: deque[tuple[float, float, int, bool, Any, Any]] = deque()
        runner._run = self
        threading.Thread(target=self._write, daemon=True).start()

    def __call__(self, groups: Any) -> Any:
        begun, ended = self._events(), self._events()
        began_s = now()
        begun.record()
        steps = self._run(groups)
        ended.record()
        rows = sum(state.rows for group in groups for state in group)
        is_compiled = self._graphs is not None and self._graphs.was_compiled
        self._waiting.append((began_s, now(), rows, is_compiled, begun, ended))
        return steps

    def _write(self) -> None:
        last = None
        while True:
            while self._waiting and self._waiting[0][5].query():
                began_s, launched_s, rows, is_compiled, begun, ended = self._waiting.popleft()
                note(
                    "step",
                    at_s=began_s,
                    launch_ms=1e3 * (launched_s - began_s),
                    rows=rows,
                    compiled=is_compiled,
                    gpu_ms=begun.elapsed_time(ended),
                    interval_ms=last.elapsed_time(ended) if last is not None else 0.0,
                )
                last = ended
            time.sleep(0.2)


def load_runner(settings: Any, files: Any, shared: Any) -> Any:
    runner = start.load(settings, files, shared)
    if runner._on_gpu:
        Steps(runner)
    return runner


def _import(files: Any) -> None:
    """As `start` imports, and then has the parts timed that are there now."""
    _imports(files)
    from worker.device import attention, model_runner, unet_patches, warm_up
    from worker.device.compiling.ahead import Ahead
    from worker.device.compiling.compiler import CompiledLanes
    from worker.device.compiling.process import CompileProcess
    from worker.model import half_vae, loader

    for owner, name, label in (
        (loader, "take_gpu", "take the GPU"),
        (loader, "_load_pipeline", "from_pretrained"),
        (loader, "_check_pipeline", "check the weights"),
        (loader, "_to_device", "to the GPU, with the VAE"),
        (half_vae, "to_half", "the VAE in fp16"),
        (loader, "load", "load, all"),
        (unet_patches, "install", "patches"),
        (attention, "load_xformers", "import xformers"),
        (attention, "_probe", "probe xformers"),
        (attention, "time_kernel", "time a kernel"),
        (attention, "install", "choose attention, all"),
        (warm_up, "run_trial", "trial picture"),
        (warm_up, "measure_steps", "cost of steps"),
        (model_runner.ModelRunner, "warm_up", "warm up, all"),
        (model_runner.ModelRunner, "__init__", "runner, all"),
        (CompileProcess, "compile", "compile elsewhere"),
        (CompiledLanes, "_compile", "compile and load"),
        (CompiledLanes, "_loaded", "load compiled code"),
        (CompileProcess, "find", "look for compiled code"),
        (Ahead, "load", "wait for it before the first job"),
    ):
        timed(owner, name, label)


_imports = start._import
start._import = _import
timed(start, "_wake_gpu", "wake the GPU")
timed(start, "_find", "find and hash the model")
timed(start, "_import", "imports")
timed(tasks, "_services", "Redis and the bucket")
timed(tasks, "_files", "files beside the model")
timed(tasks, "_assemble", "assemble, all")
tasks.load_runner = load_runner
tasks.JobHandler = FirstJob  # type: ignore[misc]
tasks.BucketProcess = FolderStorage  # type: ignore[assignment, misc]
tasks.wait_for_both = lambda settings: None
note("event", what="worker.tasks imported", at_s=now())
