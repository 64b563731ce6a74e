"""An emulated GPU: streams that share its time, the cost of work on it, and a runner that uses it."""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from tests.faults.runner import FaultRunner
from worker.contract.errors import SmallcatError
from worker.contract.job import Job
from worker.device.beginnings import Beginning
from worker.device.job_state import FiniteCheck, JobState
from worker.device.schedulers.schedule import SLOTS, Schedule
from worker.device.step import batch_of
from worker.device.text.job_text import plain_text
from worker.engine.runner import JobInputs, Picture

#: Milliseconds of a step by its rows, and of a decode call by its pictures: about as on an H200, with Stable
#: Diffusion 1.x shapes at 512x512 px, compiled (docs/performance.md).
STEP_MS = {1: 6.6, 2: 6.6, 4: 10.0, 8: 17.2, 16: 33.1, 32: 65.0}
DECODE_MS = {1: 9.0, 2: 15.4, 4: 29.6, 8: 58.0}
#: Pictures in a chunk of the VAE decoder, as in `worker.device.vae.decoder` at 512x512 px.
CHUNK = max(DECODE_MS)
#: Shapes of a job's latents and text, small because they are on the CPU.
LATENTS, TEXT = (4, 8, 8), (77, 8)


def cost_s(costs: dict[int, float], size: int) -> float:
    """Seconds of `size`: those of the next larger measured size, to which it is padded."""
    sizes = list(costs)
    return costs[sizes[min(bisect.bisect_left(sizes, size), len(sizes) - 1)]] / 1e3


class Device:
    """Streams that share a device: the first task of each advances, at the same rate."""

    def __init__(self, streams: int) -> None:
        self._streams: list[deque[tuple[list[float], threading.Event]]] = [deque() for _ in range(streams)]
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self, stream: int, seconds: float) -> threading.Event:
        """Append work of `seconds` to a stream. The event is set when it is done."""
        done = threading.Event()
        with self._changed:
            self._streams[stream].append(([seconds], done))
            self._changed.notify()
        return done

    def _run(self) -> None:
        with self._changed:
            while True:
                heads = [stream[0] for stream in self._streams if stream]
                started_s = time.perf_counter()
                if not heads:
                    self._changed.wait()
                    continue
                self._changed.wait(min(left[0] for left, _ in heads) * len(heads))
                passed_s = (time.perf_counter() - started_s) / len(heads)
                for left, _ in heads:
                    left[0] -= passed_s
                for stream in self._streams:
                    if stream and stream[0][0][0] <= 0:
                        stream.popleft()[1].set()


class EmulatedRunner(FaultRunner):
    """Keeps the contract of `worker.engine.runner.Runner` as `worker.device.model_runner` does on a GPU.

    Its job states are real ones, small and on the CPU, so that torch's Python code competes with all threads.
    """

    decodes_beside = True
    is_compiling = False

    def __init__(self, rows: int, steps: int) -> None:
        """`rows`: the most in a step. `steps`: of a job that names none."""
        self.job_s = steps * cost_s(STEP_MS, rows) / rows
        super().__init__(rows, 0.0, lambda event, job: None, lambda job_id, times: False)
        self._device = Device(streams=2)
        self._text = torch.zeros(1, *TEXT)
        #: The last step of each job in flight.
        self._steps: dict[int, threading.Event] = {}

    def prepare(self, job: Job, inputs: JobInputs | None = None) -> JobState:  # type: ignore[override]
        steps = job.steps or 1
        schedule = Schedule(
            tuple(map(float, range(steps))),
            1.0,
            (1.0,) * steps,
            torch.zeros(steps, SLOTS, SLOTS + 2),
            (False,) * steps,
        )
        generator = torch.Generator("cpu").manual_seed(job.seed)
        noise = torch.randn((1, *LATENTS), generator=generator)[0] * schedule.noise_scale
        text = plain_text({"text": self._text}, (), guided=False)
        return JobState(job, LATENTS, text, {}, schedule, None, generator, Beginning(noise))

    def step(self, jobs: Sequence[JobState]) -> list[SmallcatError | None]:  # type: ignore[override]
        batch = batch_of([job.next_inputs() for job in jobs])
        inputs = batch.zeros(len(jobs), len(jobs))
        for into, value in zip(inputs.tensors(), batch.tensors(), strict=True):
            into.copy_(value)
        done = self._device.launch(0, cost_s(STEP_MS, sum(job.rows for job in jobs)))
        states, predictions = inputs.states.clone(), inputs.noise.clone()
        check = FiniteCheck(torch.ones(len(jobs), dtype=torch.bool))
        for index, job in enumerate(jobs):
            # Whether it is finite is checked one step later.
            before, self._steps[id(job)] = self._steps.get(id(job)), done
            if before is not None:
                before.wait()
            job.advance(check, index, states[index], predictions[index])
        return [None] * len(jobs)

    def decode(  # type: ignore[override]
        self, jobs: Sequence[JobState], *, is_alone: bool = False
    ) -> Iterator[Picture | SmallcatError]:
        for job in jobs:
            self._steps.pop(id(job)).wait()
            job.failure()
        chunks = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
        return self._pictures([self._chunk(chunk) for chunk in chunks])

    def _chunk(self, jobs: Sequence[JobState]) -> tuple[torch.Tensor, threading.Event]:
        latents = torch.cat([job.latents for job in jobs]) / 2
        pixels = latents.new_zeros((len(latents), 8, 8, 3), dtype=torch.uint8)
        return pixels, self._device.launch(1, cost_s(DECODE_MS, len(jobs)))

    def _pictures(
        self, chunks: Sequence[tuple[torch.Tensor, threading.Event]]
    ) -> Iterator[Picture | SmallcatError]:
        for pixels, done in chunks:
            done.wait()
            for picture in pixels:
                yield Picture(picture.numpy())
