"""The engine at saturation: always as many jobs in flight as in a worker, without those that it uploads."""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from worker.contract.job import Job
from worker.engine.capacity import JOBS_PER_ROW
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered

#: Threads that submit.
SUBMITTERS = 8


class Load:
    """An engine and its jobs, of which there are always as many. For one thread."""

    def __init__(self, runner: Any, fields: dict[str, Any]) -> None:
        """`runner` keeps the contract of `worker.engine.runner.Runner`. `fields`: those of the jobs."""
        #: When each step ended, its rows, and the seconds that it took.
        self.steps: list[tuple[float, int, float]] = []
        self._engine: Engine[Any] = Engine(
            runner, job_timeout_s=600, on_failure=_die, on_step=self._note_step
        )
        self._fields = fields
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        # As in a worker: text is encoded on the thread that submits.
        self._threads = ThreadPoolExecutor(SUBMITTERS)
        self._number = 0

    def begin(self, jobs: int) -> None:
        """Have so many in flight, and let as many be done."""
        for _ in range(jobs):
            self._submit()
        self._engine.start()
        for _ in range(jobs):
            self.turn()

    def turn(self) -> None:
        """Wait until a job is done, and submit another one."""
        self._done.get(timeout=600)
        self._submit()

    def keep(self, seconds: float) -> tuple[float, float]:
        """Go on for so many seconds. Returns when that began and when it ended, after a whole job."""
        begun_s = ended_s = time.perf_counter()
        while ended_s - begun_s < seconds:
            self.turn()
            ended_s = time.perf_counter()
        return begun_s, ended_s

    def end(self) -> None:
        """Give up the jobs in flight."""
        self._threads.shutdown()
        self._engine.stop()

    def job(self, number: int) -> Job:
        """The job of that number, from 1 on."""
        prompt = f"a small cat, number {number % 50}"
        return Job.parse({"prompt": prompt, "seed": number, **self._fields})

    def send(self, job: Job, engine: Engine[Any]) -> Future[Rendered]:
        """Submit it, on a thread of its own."""
        return engine.submit(job.id, job)

    def _submit(self) -> None:
        self._number += 1
        job = self.job(self._number)
        self._threads.submit(lambda: self.send(job, self._engine).add_done_callback(self._finish))

    def _finish(self, future: Future[Rendered]) -> None:
        # Jobs that are given back at the end do not count.
        if future.exception() is None:
            self._done.put(None)

    def _note_step(self, rows: int, took_s: float) -> None:
        self.steps.append((time.perf_counter(), rows, took_s))


def saturate(
    runner: Any,
    seconds: float,
    *,
    warm_s: float = 0.0,
    during: AbstractContextManager[Any] | None = None,
    after: Callable[[Callable[[], None]], dict[str, float]] | None = None,
    **fields: Any,
) -> dict[str, float]:
    """The rates of `runner` with jobs of these `fields`, after a batch to warm up and `warm_s` seconds.

    `during`: a context for the time that is measured. `after`: called when that is over, with what keeps the
    engine busy for one job more; its figures are added.
    """
    load = Load(runner, fields)
    one = runner.prepare(Job.parse({"prompt": "a small cat", **fields}).resolved(runner.served))
    load.begin(JOBS_PER_ROW * runner.cap(one.lane))
    load.keep(warm_s)
    with during or nullcontext():
        begun_s, ended_s = load.keep(seconds)
    # After the measurement: recording slows the engine down.
    more = after(load.turn) if after else {}
    load.end()
    inside = [(rows, took_s) for at_s, rows, took_s in load.steps if begun_s <= at_s <= ended_s]
    # By the rows of their steps, not by those that ended: jobs end in groups, and how far the others are at
    # the beginning and at the end is as much as a sixth of what a large model does in half a minute.
    return {
        "images_s": sum(rows for rows, _ in inside) / (one.rows * one.steps) / (ended_s - begun_s),
        "rows": sum(rows for rows, _ in inside) / len(inside),
        "step_ms": 1e3 * sum(took_s for _, took_s in inside) / len(inside),
        "no_step_share": 1 - sum(took_s for _, took_s in inside) / (ended_s - begun_s),
        **more,
    }


def _die(error: BaseException) -> None:
    logging.getLogger("smallcat.engine").critical("lost: %r", error)
    os._exit(1)
