"""A worker whose GPU is emulated, for `tests.benchmarks.emulated`.

All parts are the worker's own except the runner, which is in `tests.benchmarks.emulated_gpu`. The environment
sets:

    EMULATED_ROWS         rows in a step, at most
    EMULATED_STEPS        the model's default steps
    EMULATED_ENCODE_MS    milliseconds to encode a picture, without using a core
    EMULATED_SIDE         encode and upload a photo of so many pixels a side instead of the runner's picture
    EMULATED_ENCODED      file to which the seconds of each encoding are appended, a line each
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

import worker.jobs.handler as handler
import worker.tasks as tasks
from tests.benchmarks import encoding
from tests.benchmarks.emulated_gpu import EmulatedRunner
from worker.celery import app as app
from worker.contract.settings import WorkerSettings
from worker.engine.runner import Picture
from worker.jobs import image_file


@functools.cache
def photo(side: int) -> Picture:
    """A picture of the size and the grain of real ones."""
    return Picture(np.asarray(encoding.pictures(side)["photo with grain"]))


def encode(picture: Picture, *given: Any, **options: Any) -> bytes:
    """Encode as the worker does, after the time that a real picture takes."""
    time.sleep(float(os.environ["EMULATED_ENCODE_MS"]) / 1e3)
    if side := int(os.environ.get("EMULATED_SIDE", "0")):
        picture = photo(side)
    began_s = time.perf_counter()
    data = image_file.encode(picture, *given, **options)
    if path := os.environ.get("EMULATED_ENCODED"):
        with Path(path).open("a") as file:
            file.write(f"{time.perf_counter() - began_s}\n")
    return data


def load_runner(settings: WorkerSettings, files: object, shared: object) -> EmulatedRunner:
    return EmulatedRunner(int(os.environ["EMULATED_ROWS"]), int(os.environ["EMULATED_STEPS"]))


handler.encode = encode  # type: ignore[assignment]
tasks.preload = lambda settings: None
tasks.load_runner = load_runner  # type: ignore[assignment]
