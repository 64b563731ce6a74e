"""Experiments a and c: whole pictures, and batches of jobs, by the worker's own model runner."""

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

#: The origin's prompt.
PROMPT = "a small cat"
#: Steps before the clock starts: kernels are chosen, and graphs captured, in the first ones.
WARM_UPS = 2
#: Steps and decodings that are timed, at least.
TIMED = 3


@dataclass(frozen=True)
class Plan:
    """How much to measure with each setup."""

    #: Denoising steps of a picture.
    steps: int
    #: Whole pictures in a; the fastest counts. 0: none.
    pictures: int
    #: Jobs of the batches in c, rising; may be empty.
    jobs: Sequence[int]
    #: Seconds of steps that are timed for each batch.
    seconds: float

    @property
    def measurements(self) -> int:
        """How many figures a setup gives."""
        return bool(self.pictures) + len(self.jobs)


class Bench:
    """One setup of the model, loaded and warm. `free` what it leaves before the next one: two may not fit."""

    def __init__(self, settings: WorkerSettings, setup: Setup, plan: Plan) -> None:
        """Load, compile and warm up. Raises `SettingsError` when the setup is not to be had here."""
        self._setup, self._plan = setup, plan
        self._runner = ModelRunner(
            settings.model_copy(
                update={
                    "attention": setup.attention,
                    "use_memory_efficient_attention": None,
                    "compile": setup.compiled,
                    "max_batch": 2 * max((1, *plan.jobs)),
                }
            )
        )
        chosen = {choice.what: choice for choice in (*self._runner.choices, *self._runner.warm_up())}
        if setup.compiled and chosen["compile"].choice == "no":
            raise SettingsError(f"not compiled: {chosen['compile'].reason}")

    def cat(self) -> Cat:
        """Experiment a: one picture from its prompt to its pixels."""
        self._reset_memory()
        try:
            # The first one is a warm-up.
            fastest = min([self._seconds_of_a_picture() for _ in range(1 + self._plan.pictures)][1:])
        except SmallcatError as error:
            return Cat(self._setup, left_out=_reason(error))
        return Cat(self._setup, fastest, self._memory_gib())

    def rates(self) -> Iterator[Rate]:
        """Experiment c: a rate for each batch. After one that fails, all larger ones are left out."""
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
        # A step costs the same whatever the job's number of steps, so there are always enough to time.
        renders = [self._runner.prepare(self._job(seed, steps=50)) for seed in range(jobs)]
        for _ in range(WARM_UPS):
            self._step(renders)
        step_s = self._mean_s(lambda: self._step(renders), most=renders[0].steps - WARM_UPS)
        self._decode(renders)
        decode_s = self._mean_s(lambda: self._decode(renders), most=TIMED)
        return Rate(
            self._setup,
            jobs,
            step_ms=1e3 * step_s,
            decode_ms=1e3 * decode_s,
            images_per_s=images_per_s(jobs, steps, step_s, decode_s),
            memory_gib=self._memory_gib(),
        )

    def _mean_s(self, run: Callable[[], None], *, most: int) -> float:
        """Seconds of one call, over as many as the plan has time for: `TIMED` to `most`."""
        _settle()
        started_s = time.perf_counter()
        for times in range(1, most + 1):
            run()
            if times >= TIMED and time.perf_counter() - started_s >= self._plan.seconds:
                break
        _settle()
        return (time.perf_counter() - started_s) / times

    def _seconds_of_a_picture(self) -> float:
        started_s = time.perf_counter()
        render = self._runner.prepare(self._job(0))
        while render.step < render.steps:
            self._step([render])
        self._decode([render])
        return time.perf_counter() - started_s

    def _step(self, renders: Sequence[JobState]) -> None:
        for failure in self._runner.step(renders):
            if failure is not None:
                raise failure

    def _decode(self, renders: Sequence[JobState]) -> None:
        for picture in self._runner.decode(renders):
            if isinstance(picture, SmallcatError):
                raise picture

    def _job(self, seed: int, steps: int | None = None) -> Job:
        return Job(prompt=PROMPT, seed=seed, steps=steps or self._plan.steps)

    def _reset_memory(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def _memory_gib(self) -> float | None:
        """The most that was held on the GPU since the last reset.

        None where compiled: its graphs keep room for batches of every size, and none has memory of its own.
        """
        if self._setup.compiled or not torch.cuda.is_initialized():
            return None
        return torch.cuda.max_memory_allocated() / 2**30


def _settle() -> None:
    """Wait until the GPU has done all it was asked for: a step returns before."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _reason(error: SmallcatError) -> str:
    return "does not fit in memory" if isinstance(error, OutOfMemoryError) else str(error)


def free() -> None:
    """Give back what a setup that nobody refers to any more held: memory, and compiled code."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
