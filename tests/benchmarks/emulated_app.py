"""A worker whose GPU is emulated, for `tests.benchmarks.emulated`.

All of it is `worker`'s own but the runner: steps and decodings keep two streams of a pretended device busy
for as long as they would a GPU, which both streams share. The environment sets the rest:

    EMULATED_ROWS         rows of a step, at most
    EMULATED_STEPS        steps of a job, by the model's default
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
from tests.benchmarks.emulated_gpu import CHUNK, DECODE_MS, STEP_MS, Device, cost_s
from tests.faults.runner import FaultRender, FaultRunner
from worker.celery import app as app
from worker.errors import SmallcatError
from worker.images import Picture
from worker.job import Job
from worker.settings import WorkerSettings


class EmulatedRunner(FaultRunner):
    """Keeps `worker.runner.Runner`'s contract as `worker.model_runner` does on a GPU."""

    decodes_beside = True

    def __init__(self, rows: int) -> None:
        self.job_s = int(os.environ["EMULATED_STEPS"]) * cost_s(STEP_MS, rows) / rows
        super().__init__(rows, 0.0, lambda event, job: None, lambda job_id, times: False)
        self._device = Device(streams=2)
        #: The last step of each render on board.
        self._steps: dict[int, threading.Event] = {}

    def step(self, renders: Sequence[FaultRender]) -> list[SmallcatError | None]:
        done = self._device.set_off(0, cost_s(STEP_MS, sum(render.rows for render in renders)))
        for render in renders:
            # Whether it is finite is asked one step later.
            before, self._steps[id(render)] = self._steps.get(id(render)), done
            if before is not None:
                before.wait()
            render.step += 1
        return [None] * len(renders)

    def decode(self, renders: Sequence[FaultRender]) -> Iterator[Picture | SmallcatError]:
        for render in renders:
            self._steps.pop(id(render)).wait()
        chunks = [renders[start : start + CHUNK] for start in range(0, len(renders), CHUNK)]
        done = [self._device.set_off(1, cost_s(DECODE_MS, len(chunk))) for chunk in chunks]
        return self._pictures([(len(chunk), event) for chunk, event in zip(chunks, done, strict=True)])

    def _pictures(self, chunks: Sequence[tuple[int, threading.Event]]) -> Iterator[Picture | SmallcatError]:
        for size, done in chunks:
            done.wait()
            for _ in range(size):
                yield Picture(np.zeros((8, 8, 3), np.uint8))


def encode(picture: Picture, job: Job) -> bytes:
    """The worker's own, after the time that a real picture takes."""
    time.sleep(float(os.environ["EMULATED_ENCODE_MS"]) / 1e3)
    return _encode(picture, job)


def load_runner(settings: WorkerSettings) -> EmulatedRunner:
    return EmulatedRunner(int(os.environ["EMULATED_ROWS"]))


_encode = render_service._encode
render_service._encode = encode
tasks.load_runner = load_runner  # type: ignore[assignment]
