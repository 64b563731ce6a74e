"""A worker whose GPU is emulated, for `tests.benchmarks.emulated`.

All of it is `worker`'s own but the runner, which is `tests.benchmarks.emulated_gpu`'s. The environment sets:

    EMULATED_ROWS         rows of a step, at most
    EMULATED_STEPS        steps of a job, by the model's default
    EMULATED_ENCODE_MS    milliseconds of a picture's encoding, which keeps no core busy here
"""

from __future__ import annotations

import os
import time

import worker.jobs.handler as render_service
import worker.tasks as tasks
from tests.benchmarks.emulated_gpu import EmulatedRunner
from worker.celery import app as app
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.engine.runner import Picture


def encode(picture: Picture, job: Job) -> bytes:
    """The worker's own, after the time that a real picture takes."""
    time.sleep(float(os.environ["EMULATED_ENCODE_MS"]) / 1e3)
    return _encode(picture, job)


def load_runner(settings: WorkerSettings) -> EmulatedRunner:
    return EmulatedRunner(int(os.environ["EMULATED_ROWS"]), int(os.environ["EMULATED_STEPS"]))


_encode = render_service._encode
render_service._encode = encode
tasks.load_runner = load_runner  # type: ignore[assignment]
