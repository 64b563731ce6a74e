"""Jobs run together; one that may kill its worker runs alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.worker.engine.fake_runner import SOON_S
from worker.contract.errors import EngineStoppedError
from worker.jobs.quarantine import Quarantine


class Jobs:
    """Jobs on threads, each of which runs until it is let go."""

    def __init__(self) -> None:
        self.quarantine = Quarantine()
        self.running: set[str] = set()
        self.together: list[set[str]] = []
        self._changed = threading.Condition()
        self._go: dict[str, threading.Event] = {}
        self._pool = ThreadPoolExecutor(8)

    def start(self, name: str, *, alone: bool = False) -> Future[None]:
        self._go[name] = threading.Event()
        return self._pool.submit(self._run, name, alone)

    def _run(self, name: str, alone: bool) -> None:
        with self.quarantine.admit(alone=alone):
            with self._changed:
                self.running.add(name)
                self.together.append(set(self.running))
                self._changed.notify_all()
            assert self._go[name].wait(SOON_S)
            with self._changed:
                self.running.discard(name)

    def end(self, name: str) -> None:
        self._go[name].set()

    def until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, SOON_S)

    def wait_for_waiting(self) -> None:
        """Until a job waits to run alone."""
        with self.quarantine._changed:
            assert self.quarantine._changed.wait_for(lambda: self.quarantine._waiting_alone == 1, SOON_S)

    def close(self) -> None:
        self.quarantine.stop()
        for go in self._go.values():
            go.set()
        self._pool.shutdown()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()


def test_jobs_run_together(jobs: Jobs) -> None:
    jobs.start("a")
    jobs.start("b")
    jobs.until(lambda: jobs.running == {"a", "b"})


def test_a_suspect_waits_for_the_others_and_then_runs_alone(jobs: Jobs) -> None:
    jobs.start("a")
    jobs.until(lambda: jobs.running == {"a"})
    jobs.start("suspect", alone=True)
    jobs.wait_for_waiting()
    # It is next: one that comes later waits for it.
    jobs.start("late")
    assert jobs.running == {"a"}
    jobs.end("a")
    jobs.until(lambda: jobs.running == {"suspect"})
    jobs.end("suspect")
    jobs.until(lambda: jobs.running == {"late"})
    assert {"suspect"} in jobs.together
    assert all(each == {"suspect"} for each in jobs.together if "suspect" in each)


def test_suspects_run_one_after_the_other(jobs: Jobs) -> None:
    names = [f"suspect {number}" for number in range(4)]
    futures = [jobs.start(name, alone=True) for name in names]
    for name in names:
        jobs.end(name)
    for future in futures:
        future.result(SOON_S)
    assert sorted(jobs.together, key=str) == [{name} for name in names]


def test_an_error_in_a_job_lets_the_next_one_run(jobs: Jobs) -> None:
    with pytest.raises(ValueError, match="its own"), jobs.quarantine.admit(alone=True):
        raise ValueError("its own")
    jobs.start("a")
    jobs.until(lambda: jobs.running == {"a"})


@pytest.mark.parametrize("alone", [True, False])
def test_stopping_gives_back_those_that_wait(jobs: Jobs, alone: bool) -> None:
    jobs.start("suspect", alone=True)
    jobs.until(lambda: jobs.running == {"suspect"})
    waiting = jobs.start("waits", alone=alone)
    jobs.quarantine.stop()
    assert isinstance(waiting.exception(SOON_S), EngineStoppedError)
    with pytest.raises(EngineStoppedError), jobs.quarantine.admit(alone=alone):
        pass
