"""An engine on a fake runner, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.worker.engine.fake_runner import SOON_S, FakeRunner, FakeState, job_of
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered


@dataclass
class Bench:
    """An engine on a fake runner, with a clock that only the test moves."""

    runner: FakeRunner
    job_timeout_s: float = 1e6
    now_s: float = 0.0
    failures: list[BaseException] = field(default_factory=list)
    failed: threading.Event = field(default_factory=threading.Event)
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine: Engine[FakeState] = Engine(
            self.runner,
            job_timeout_s=self.job_timeout_s,
            on_failure=self._on_failure,
            on_step=lambda rows, seconds: self.steps.append(rows),
            clock=lambda: self.now_s,
        )

    def _on_failure(self, error: BaseException) -> None:
        self.failures.append(error)
        self.failed.set()

    def submit(self, seed: int, **fields: object) -> Future[Rendered]:
        job = job_of(seed, **fields)
        return self.engine.submit(job.id, job)

    def submit_together(self, *seeds: int, **fields: object) -> list[Future[Rendered]]:
        """Submit before the loop starts, so that all are in the first step."""
        return [self.submit(seed, **fields) for seed in seeds]

    def cancel(self, seed: int, **fields: object) -> None:
        self.engine.cancel(job_of(seed, **fields).id)


@contextmanager
def bench_of(runner: FakeRunner, **options: Any) -> Iterator[Bench]:
    """A bench whose engine is not started yet. It is stopped at the end."""
    bench = Bench(runner, **options)
    try:
        yield bench
    finally:
        runner.gate.set()
        runner.decode_gate.set()
        runner.picture_gate.set()
        bench.engine.stop()
        assert not bench.failures or bench.failed.is_set()


def picture(future: Future[Rendered]) -> Any:
    return future.result(SOON_S).picture.pixels


def error_of(future: Future[Rendered]) -> BaseException:
    error = future.exception(SOON_S)
    assert error is not None
    return error
