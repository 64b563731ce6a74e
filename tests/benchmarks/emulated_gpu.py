"""A GPU that only takes time: streams that share it, what work on it costs, and a runner on two of them."""

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
from worker.device.job_state import FiniteCheck, JobState
from worker.device.schedule import SLOTS, Schedule
from worker.device.step import batch_of
from worker.engine.runner import Picture

#: Milliseconds of a step by its rows, and of a decoding by its pictures: about as on an H200, with Stable
#: Diffusion 1.x shapes at 512x512 px, compiled (docs/performance.md).
STEP_MS = {1: 6.6, 2: 6.6, 4: 10.0, 8: 17.2, 16: 33.1, 32: 65.0}
DECODE_MS = {1: 9.0, 2: 15.4, 4: 29.6, 8: 58.0}
#: Pictures that are decoded at once, as `worker.device.vae_decoder` does at 512x512 px.
CHUNK = max(DECODE_MS)
#: Shapes of a job's latents and text, small for the CPU's sake.
LATENTS, TEXT = (4, 8, 8), (77, 8)


def cost_s(costs: dict[int, float], size: int) -> float:
    """What `size` costs: as much as the next larger one that was measured, of which it is a part."""
    sizes = list(costs)
    return costs[sizes[min(bisect.bisect_left(sizes, size), len(sizes) - 1)]] / 1e3


class Device:
    """Streams that share a device: what is at the head of each advances, at the same pace."""

    def __init__(self, streams: int) -> None:
        self._streams: list[deque[tuple[list[float], threading.Event]]] = [deque() for _ in range(streams)]
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def set_off(self, stream: int, seconds: float) -> threading.Event:
        """Begin what takes `seconds` alone, after all of its stream. The event tells when it is done."""
        done = threading.Event()
        with self._changed:
            self._streams[stream].append(([seconds], done))
            self._changed.notify()
        return done

    def _run(self) -> None:
        with self._changed:
            while True:
                heads = [stream[0] for stream in self._streams if stream]
                begun_s = time.perf_counter()
                if not heads:
                    self._changed.wait()
                    continue
                self._changed.wait(min(left[0] for left, _ in heads) * len(heads))
                passed_s = (time.perf_counter() - begun_s) / len(heads)
                for left, _ in heads:
                    left[0] -= passed_s
                for stream in self._streams:
                    if stream and stream[0][0][0] <= 0:
                        stream.popleft()[1].set()


class EmulatedRunner(FaultRunner):
    """Keeps `worker.engine.runner.Runner`'s contract as `worker.device.model_runner` does on a GPU.

    Its jobs are real ones, on the CPU and small: torch's own Python, for which all threads fight, is there.
    """

    decodes_beside = True

    def __init__(self, rows: int, steps: int) -> None:
        """Steps take up to `rows` rows; a job that does not say takes `steps` of them."""
        self.job_s = steps * cost_s(STEP_MS, rows) / rows
        super().__init__(rows, 0.0, lambda event, job: None, lambda job_id, times: False)
        self._device = Device(streams=2)
        self._text = torch.zeros(1, *TEXT)
        #: The last step of each render on board.
        self._steps: dict[int, threading.Event] = {}

    def prepare(self, job: Job) -> JobState:  # type: ignore[override]
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
        return JobState(job, LATENTS, {"text": self._text}, schedule, None, generator, noise, guided=False)

    def step(self, renders: Sequence[JobState]) -> list[SmallcatError | None]:  # type: ignore[override]
        batch = batch_of([render.next_inputs() for render in renders])
        inputs = batch.zeros(len(renders), len(renders))
        for into, value in zip(inputs.tensors(), batch.tensors(), strict=True):
            into.copy_(value)
        done = self._device.set_off(0, cost_s(STEP_MS, sum(render.rows for render in renders)))
        states, predictions = inputs.states.clone(), inputs.noise.clone()
        check = FiniteCheck(torch.ones(len(renders), dtype=torch.bool))
        for place, render in enumerate(renders):
            # Whether it is finite is asked one step later.
            before, self._steps[id(render)] = self._steps.get(id(render)), done
            if before is not None:
                before.wait()
            render.advance(check, place, states[place], predictions[place])
        return [None] * len(renders)

    def decode(self, renders: Sequence[JobState]) -> Iterator[Picture | SmallcatError]:  # type: ignore[override]
        for render in renders:
            self._steps.pop(id(render)).wait()
            render.failure()
        chunks = [renders[start : start + CHUNK] for start in range(0, len(renders), CHUNK)]
        return self._pictures([self._chunk(chunk) for chunk in chunks])

    def _chunk(self, renders: Sequence[JobState]) -> tuple[torch.Tensor, threading.Event]:
        latents = torch.cat([render.latents for render in renders]) / 2
        pixels = latents.new_zeros((len(latents), 8, 8, 3), dtype=torch.uint8)
        return pixels, self._device.set_off(1, cost_s(DECODE_MS, len(renders)))

    def _pictures(
        self, chunks: Sequence[tuple[torch.Tensor, threading.Event]]
    ) -> Iterator[Picture | SmallcatError]:
        for pixels, done in chunks:
            done.wait()
            for picture in pixels:
                yield Picture(picture.numpy())
