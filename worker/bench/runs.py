"""Experiments a and c: whole pictures and batches of jobs, run by the worker's own model runner."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from worker.bench.report import Cat, Rate, Setup, images_per_s
from worker.contract.errors import OutOfMemoryError, SettingsError, SmallcatError
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner

#: The prompt of PhotoRoom's benchmark.
PROMPT = "a small cat"
#: Steps before the clock starts: the first ones choose kernels and capture graphs.
WARM_UPS = 2
#: Least number of steps, and of decode calls, that are timed.
TIMED = 3


@dataclass(frozen=True)
class Plan:
    """What to measure with each setup."""

    #: Denoising steps of a picture.
    steps: int
    #: Experiment a: whole pictures; the fastest counts. 0: none.
    pictures: int
    #: Experiment c: jobs in a batch, rising; may be empty.
    jobs: Sequence[int]
    #: Seconds of steps that are timed for each batch.
    seconds: float

    @property
    def measurements(self) -> int:
        """The number of figures for each setup."""
        return bool(self.pictures) + len(self.jobs)


class LoadedSetup:
    """One setup, loaded and warmed up. Call `free` before the next one: two may not fit in memory."""

    def __init__(self, settings: WorkerSettings, setup: Setup, plan: Plan) -> None:
        """Load, compile and warm up. Raises `SettingsError` if the setup does not work on this machine."""
        self._setup, self._plan = setup, plan
        self._runner = ModelRunner(
            settings.model_copy(
                update={
                    "attention": setup.attention,
                    "use_memory_efficient_attention": None,
                    "compile": setup.compiled,
                    "compile_first": True,
                    "max_batch": 2 * max((1, *plan.jobs)),
                }
            )
        )
        chosen = {choice.what: choice for choice in (*self._runner.choices, *self._runner.warm_up())}
        if setup.compiled and chosen["compile"].choice == "no":
            raise SettingsError(f"not compiled: {chosen['compile'].reason}")

    def cat(self) -> Cat:
        """Experiment a: one picture, from its prompt to its pixels."""
        self._reset_memory()
        try:
            # The first picture is a warm-up.
            fastest = min([self._seconds_of_a_picture() for _ in range(1 + self._plan.pictures)][1:])
        except SmallcatError as error:
            return Cat(self._setup, left_out=_reason(error))
        return Cat(self._setup, fastest, self._memory_gib())

    def rates(self) -> Iterator[Rate]:
        """Experiment c: the throughput of each batch. If one fails, all larger ones are left out."""
        left_out = ""
        for jobs in self._plan.jobs:
            if not left_out:
                try:
                    yield self._rate(jobs)
                    continue
                except SmallcatError as error:
                    left_out = _reason(error)
            yield Rate(self._setup, jobs, left_out=left_out)

    def _rate(self, jobs: int) -> Rate:
        self._reset_memory()
        steps = self._runner.prepare(self._job(0)).steps
        # With 50 steps there are enough to time. The cost of a step does not depend on their number.
        states = [self._runner.prepare(self._job(seed, steps=50)) for seed in range(jobs)]
        for _ in range(WARM_UPS):
            self._step(states)
        step_s = self._mean_s(lambda: self._step(states), most=states[0].steps - WARM_UPS)
        self._decode(states)
        decode_s = self._mean_s(lambda: self._decode(states), most=TIMED)
        return Rate(
            self._setup,
            jobs,
            step_ms=1e3 * step_s,
            decode_ms=1e3 * decode_s,
            images_per_s=images_per_s(jobs, steps, step_s, decode_s),
            memory_gib=self._memory_gib(),
        )

    def _mean_s(self, run: Callable[[], None], *, most: int) -> float:
        """Mean seconds of a call, over as many calls as the plan has time for: `TIMED` to `most`."""
        _synchronize()
        started_s = time.perf_counter()
        for times in range(1, most + 1):
            run()
            if times >= TIMED and time.perf_counter() - started_s >= self._plan.seconds:
                break
        _synchronize()
        return (time.perf_counter() - started_s) / times

    def _seconds_of_a_picture(self) -> float:
        started_s = time.perf_counter()
        state = self._runner.prepare(self._job(0))
        while state.step < state.steps:
            self._step([state])
        self._decode([state])
        return time.perf_counter() - started_s

    def _step(self, states: Sequence[JobState]) -> None:
        for failure in self._runner.step(states):
            if failure is not None:
                raise failure

    def _decode(self, states: Sequence[JobState]) -> None:
        for picture in self._runner.decode(states):
            if isinstance(picture, SmallcatError):
                raise picture

    def _job(self, seed: int, steps: int | None = None) -> Job:
        return Job(prompt=PROMPT, seed=seed, steps=steps or self._plan.steps)

    def _reset_memory(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def _memory_gib(self) -> float | None:
        """Peak memory of the GPU since the last reset.

        None if compiled: the graphs of all batch sizes share their memory, so a batch has no peak of its own.
        """
        if self._setup.compiled or not torch.cuda.is_initialized():
            return None
        return torch.cuda.max_memory_allocated() / 2**30


def _synchronize() -> None:
    """Wait for the GPU: a step returns before it is computed."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _reason(error: SmallcatError) -> str:
    return "does not fit in memory" if isinstance(error, OutOfMemoryError) else str(error)


def free() -> None:
    """Release the memory and the compiled code of setups that are no longer referenced."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
