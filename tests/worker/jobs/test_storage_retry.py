"""Requests to the bucket are repeated while that may help; the job can be cancelled or given back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.worker.engine.fake_runner import SOON_S
from worker.contract.errors import (
    BucketRefusedError,
    EngineStoppedError,
    JobCancelledError,
    PermanentStorageError,
    StorageError,
)
from worker.jobs import storage_retry
from worker.jobs.bucket_access import BucketAccess
from worker.jobs.in_flight import JobsInFlight
from worker.jobs.retry_policy import Backoff
from worker.jobs.storage_retry import StorageRetry


class Request:
    """Raises each of `errors` in turn, the last one for ever; then it is answered."""

    def __init__(self, *errors: Exception, for_ever: bool = False) -> None:
        self._errors = list(errors)
        self._for_ever = for_ever
        self.calls = 0
        self.failed = threading.Event()

    def __call__(self) -> str:
        self.calls += 1
        if self._errors:
            error = self._errors[0] if self._for_ever and len(self._errors) == 1 else self._errors.pop(0)
            self.failed.set()
            raise error
        return "answer"


def retry(in_flight: JobsInFlight, timeout_s: float, access: BucketAccess | None = None) -> StorageRetry:
    """Where nothing else is said, the bucket takes test objects."""
    return StorageRetry(in_flight, access or BucketAccess(lambda size: None), timeout_s)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_retry, "STORAGE_BACKOFF", Backoff(0.001, 0.002))


@pytest.mark.usefixtures("quick")
def test_a_request_is_repeated_until_it_is_answered() -> None:
    request = Request(StorageError("503"), StorageError("504"))
    assert retry(JobsInFlight(), 60.0)("a", request) == "answer"
    assert request.calls == 3


@pytest.mark.usefixtures("quick")
def test_a_refusal_counts_when_it_is_repeated_while_test_objects_are_taken() -> None:
    sizes: list[int] = []
    request = Request(*[PermanentStorageError("denied")] * 3)
    with pytest.raises(PermanentStorageError, match="denied"):
        retry(JobsInFlight(), 60.0, BucketAccess(sizes.append))("a", request, 1_000)
    assert request.calls == 3
    assert sizes == [1_000] * 3


@pytest.mark.usefixtures("quick")
def test_a_refusal_that_passes_is_none() -> None:
    request = Request(*[PermanentStorageError("denied")] * 2)
    assert retry(JobsInFlight(), 60.0)("a", request) == "answer"


def test_a_refusal_of_all_gives_the_job_back_at_once() -> None:
    def refuse(size: int) -> None:
        raise PermanentStorageError("denied")

    request = Request(PermanentStorageError("denied"))
    access = BucketAccess(refuse)
    try:
        with pytest.raises(BucketRefusedError):
            retry(JobsInFlight(), 60.0, access)("a", request)
    finally:
        access.end()
    assert request.calls == 1


@pytest.mark.usefixtures("quick")
def test_a_refusal_that_nobody_can_judge_is_repeated_as_a_failure() -> None:
    def fail(size: int) -> None:
        raise StorageError("503")

    request = Request(*[PermanentStorageError("denied")] * 9)
    assert retry(JobsInFlight(), 60.0, BucketAccess(fail))("a", request) == "answer"
    assert request.calls == 10


@pytest.mark.usefixtures("quick")
def test_it_ends_with_the_last_error_when_the_time_is_over() -> None:
    with pytest.raises(StorageError, match=r"failed for 0\.02 s \(SMALLCAT_UPLOAD_TIMEOUT_S\): 503"):
        retry(JobsInFlight(), 0.02)("a", Request(StorageError("503"), for_ever=True))


def test_a_pause_that_would_end_after_the_limit_is_not_begun() -> None:
    request = Request(StorageError("503"))
    with pytest.raises(StorageError, match=r"failed for 0\.4 s"):
        retry(JobsInFlight(), 0.4)("a", request)
    assert request.calls == 1


@pytest.mark.parametrize(
    ("interrupt", "error"),
    [("cancel", JobCancelledError), ("stop", EngineStoppedError)],
)
def test_a_job_that_waits_is_woken(
    monkeypatch: pytest.MonkeyPatch, interrupt: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(storage_retry, "STORAGE_BACKOFF", Backoff(600.0, 600.0))
    in_flight = JobsInFlight()
    request = Request(StorageError("503"))
    with ThreadPoolExecutor(1) as pool, in_flight.hold("a"):
        waiting = pool.submit(retry(in_flight, 10_000.0), "a", request)
        assert request.failed.wait(SOON_S)
        if interrupt == "cancel":
            in_flight.cancel("another")
            in_flight.cancel("a")
        else:
            in_flight.stop()
        assert isinstance(waiting.exception(SOON_S), error)
    assert request.calls == 1


def test_a_job_that_was_cancelled_before_asks_nothing() -> None:
    in_flight = JobsInFlight()
    request = Request()
    with in_flight.hold("a"):
        in_flight.cancel("a")
        with pytest.raises(JobCancelledError):
            retry(in_flight, 60.0)("a", request)
    assert request.calls == 0
    # Submitted again, it is wanted.
    with in_flight.hold("a"):
        assert retry(in_flight, 60.0)("a", request) == "answer"


def test_progress_is_the_engine_s_until_the_job_is_rendered() -> None:
    in_flight = JobsInFlight()
    with in_flight.hold("a"), in_flight.hold("b"):
        assert in_flight.progress({"a": (3, 4), "unknown": (1, 4)}) == {"a": (3, 4), "b": (0, 0)}
        in_flight.rendered("a", 4)
        assert in_flight.progress({}) == {"a": (4, 4), "b": (0, 0)}
    assert in_flight.progress({}) == {}
