"""The thread that looks through the jobs that wait for others: again and again, whatever fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from worker.contract.errors import StorageError
from worker.jobs import waiting_jobs
from worker.jobs.waiting_jobs import WaitingJobs
from worker.state.chains import Chains


class Looked(Chains):
    """Fails at first, by the bucket and otherwise."""

    def __init__(self) -> None:
        self.left: list[Exception] = [StorageError("The bucket is away."), ValueError("a fault")]
        self.asked: list[bool] = []
        self.is_over = threading.Event()

    def look(self, is_stored: Callable[[str, str], bool]) -> None:
        if self.left:
            raise self.left.pop(0)
        self.asked.append(is_stored("a job", "a tenant"))
        self.is_over.set()


def test_it_looks_again_after_each_failure_and_ends_when_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting_jobs, "EVERY_S", 0.01)
    chains, asked = Looked(), list[Any]()
    waiting = WaitingJobs(chains, lambda *which: not asked.append(which))
    waiting.start()
    assert chains.is_over.wait(10)
    waiting.stop()
    waiting._thread.join(10)
    assert not waiting._thread.is_alive()
    assert asked[0] == ("a job", "a tenant")
    said = "Whether jobs may go on that wait for others cannot be told: The bucket is away."
    assert [each.getMessage() for each in caplog.records].count(said) == 1
