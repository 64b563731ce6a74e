"""A worker whose GPU is emulated, for `tests.benchmarks.emulated`.

All parts are the worker's own except the runner, which is in `tests.benchmarks.emulated_gpu`. The environment
sets:

    EMULATED_ROWS         rows in a step, at most
    EMULATED_STEPS        the model's default steps
    EMULATED_ENCODE_MS    milliseconds to encode a picture, without using a core
"""

from __future__ import annotations

import os
import time
from typing import Any

import worker.jobs.handler as handler
import worker.tasks as tasks
from tests.benchmarks.emulated_gpu import EmulatedRunner
from worker.celery import app as app
from worker.contract.settings import WorkerSettings
from worker.jobs import image_file


def encode(*given: Any, **options: Any) -> bytes:
    """Encode as the worker does, after the time that a real picture takes."""
    time.sleep(float(os.environ["EMULATED_ENCODE_MS"]) / 1e3)
    return image_file.encode(*given, **options)


def load_runner(settings: WorkerSettings, files: object, shared: object) -> EmulatedRunner:
    return EmulatedRunner(int(os.environ["EMULATED_ROWS"]), int(os.environ["EMULATED_STEPS"]))


handler.encode = encode  # type: ignore[assignment]
tasks.preload = lambda settings: None
tasks.load_runner = load_runner  # type: ignore[assignment]
