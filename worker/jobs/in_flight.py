"""The jobs that this process works on: how far they are, which were cancelled, whether the worker stops."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from worker.contract.errors import EngineStoppedError, JobCancelledError


class JobsInFlight:
    """All jobs between claim and acknowledgement. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps: dict[str, tuple[int, int]] = {}
        #: How many messages of each job are worked on.
        self._held: Counter[str] = Counter()
        self._cancelled: set[str] = set()
        self._stopping = False

    @contextmanager
    def hold(self, job_id: str) -> Iterator[None]:
        """Keep the job for the length of a with block. Several messages of it may do so at a time."""
        with self._changed:
            self._held[job_id] += 1
            self._steps.setdefault(job_id, (0, 0))
            # Whoever submits a job again after its cancellation wants it.
            self._cancelled.discard(job_id)
        try:
            yield
        finally:
            with self._changed:
                self._held[job_id] -= 1
                if not self._held[job_id]:
                    del self._held[job_id], self._steps[job_id]
                    self._cancelled.discard(job_id)

    def rendered(self, job_id: str, steps: int) -> None:
        """All `steps` of the job are done: from now on the engine does not know it."""
        with self._changed:
            self._steps[job_id] = (steps, steps)

    def progress(self, rendering: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """(steps done, steps in all) by job; `rendering` has those that the engine knows."""
        with self._changed:
            return {job_id: rendering.get(job_id, steps) for job_id, steps in self._steps.items()}

    def cancel(self, job_id: str) -> None:
        """Let the job end at its next `check`, and wake it if it waits; nothing where it is not in flight."""
        with self._changed:
            if job_id in self._steps:
                self._cancelled.add(job_id)
                self._changed.notify_all()

    def stop(self) -> None:
        """Wake all jobs that wait: from now on `wait` raises `EngineStoppedError`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def check(self, job_id: str) -> None:
        """Raise `JobCancelledError` where the job was cancelled."""
        if job_id in self._cancelled:
            raise JobCancelledError("The job was cancelled.")

    def wait(self, job_id: str, timeout_s: float) -> None:
        """Wait for `timeout_s` seconds, or until the job is cancelled. Raises `EngineStoppedError`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or job_id in self._cancelled, timeout_s)
            if self._stopping:
                raise EngineStoppedError("The worker is stopping: the job goes back to the queue.")
