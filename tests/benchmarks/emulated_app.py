"""A worker whose GPU is a lock, for `tests.benchmarks.emulated`.

All of it is `worker`'s own but the runner: a step and a decoding hold the lock for as long as they would keep
the GPU. The environment sets the costs:

    EMULATED_ROWS         rows of a step, at most
    EMULATED_ROW_MS       milliseconds of a row in a step
    EMULATED_DECODE_MS    milliseconds of a picture's decoding
    EMULATED_ENCODE_MS    milliseconds of a picture's encoding, which keeps no core busy here
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

import worker.render_service as render_service
import worker.tasks as tasks
from tests.faults.runner import FaultRender, FaultRunner
from worker.celery import app as app
from worker.errors import SmallcatError
from worker.images import Picture
from worker.job import Job
from worker.settings import WorkerSettings

#: Pictures that are decoded at once, as `worker.decoder` does at 512x512 px.
CHUNK = 8


def milliseconds(name: str) -> float:
    """A cost from the environment, in seconds."""
    return float(os.environ[f"EMULATED_{name}_MS"]) / 1e3


class EmulatedRunner(FaultRunner):
    """Keeps `worker.engine.Runner`'s contract, and decodes beside the steps."""

    decodes_beside = True

    def __init__(self, rows: int) -> None:
        super().__init__(rows, 0.0, lambda event, job: None, lambda job_id, times: False)
        self._gpu = threading.Lock()
        self._row_s, self._decode_s = milliseconds("ROW"), milliseconds("DECODE")

    def step(self, renders: Sequence[FaultRender]) -> list[SmallcatError | None]:
        with self._gpu:
            time.sleep(self._row_s * sum(render.rows for render in renders))
        for render in renders:
            render.step += 1
        return [None] * len(renders)

    def decode(self, renders: Sequence[FaultRender]) -> Iterator[Picture | SmallcatError]:
        for start in range(0, len(renders), CHUNK):
            chunk = renders[start : start + CHUNK]
            with self._gpu:
                time.sleep(self._decode_s * len(chunk))
            yield from [Picture(np.zeros((8, 8, 3), np.uint8))] * len(chunk)


def encode(picture: Picture, job: Job) -> bytes:
    """The worker's own, after the time that a real picture takes."""
    time.sleep(milliseconds("ENCODE"))
    return _encode(picture, job)


def load_runner(settings: WorkerSettings) -> EmulatedRunner:
    return EmulatedRunner(int(os.environ["EMULATED_ROWS"]))


_encode = render_service._encode
render_service._encode = encode
tasks.load_runner = load_runner  # type: ignore[assignment]
