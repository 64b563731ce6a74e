"""A refusal of one object is told from a refusal of all, by a test object; access opens again by itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import REGISTRY

from worker.contract.errors import BucketRefusedError, PermanentStorageError, StorageError
from worker.jobs.bucket_access import BucketAccess
from worker.jobs.retry_policy import Backoff

SOON_S = 10.0


class Probe:
    """The test objects of a bucket, which refuses as it is told to."""

    def __init__(self) -> None:
        #: What every test object gets, or those of more bytes than `room`.
        self.error: Exception | None = None
        self.room = 1_000_000
        self.sizes: list[int] = []
        self.asked = threading.Semaphore(0)

    def __call__(self, size: int) -> None:
        self.sizes.append(size)
        self.asked.release()
        if self.error is not None:
            raise self.error
        if size > self.room:
            raise PermanentStorageError("no room")


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def access(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketAccess]:
    monkeypatch.setattr("worker.jobs.bucket_access.REOPEN_BACKOFF", Backoff(0.001, 0.002))
    access = BucketAccess(probe)
    yield access
    access.end()


def wait_for_probe(probe: Probe, times: int = 1) -> None:
    for _ in range(times):
        assert probe.asked.acquire(timeout=SOON_S)


def wait_until_open(access: BucketAccess) -> None:
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "bucket access"] or [None]
    if thread is not None:
        thread.join(SOON_S)
    access.require()


def test_access_is_open_at_first_and_nothing_is_asked(access: BucketAccess, probe: Probe) -> None:
    access.require()
    assert access.reason == ""
    assert probe.sizes == []


def test_where_a_test_object_is_taken_the_object_alone_is_refused(access: BucketAccess, probe: Probe) -> None:
    access.judge(100)
    assert probe.sizes == [100]
    access.require()


def test_a_request_that_puts_nothing_is_judged_by_a_small_object(access: BucketAccess, probe: Probe) -> None:
    access.judge(0)
    assert probe.sizes == [8]


def test_where_a_test_object_is_refused_access_is_closed_and_said_once(
    access: BucketAccess, probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    probe.error = PermanentStorageError("The bucket refuses (ExpiredToken): get new keys.")
    with ThreadPoolExecutor(8) as threads:
        verdicts = [threads.submit(access.judge, 10) for _ in range(32)]
    assert {type(verdict.exception()) for verdict in verdicts} == {BucketRefusedError}
    with pytest.raises(BucketRefusedError):
        access.require()
    assert access.reason == "The bucket refuses (ExpiredToken): get new keys."
    wait_for_probe(probe, 5)  # It is tried again and again.
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "ExpiredToken" in caplog.text


def test_access_opens_when_a_test_object_is_taken(
    access: BucketAccess, probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    probe.error = PermanentStorageError("denied")
    with pytest.raises(BucketRefusedError):
        access.judge(10)
    wait_for_probe(probe, 2)
    assert REGISTRY.get_sample_value("smallcat_paused") == 1
    probe.error = None
    wait_until_open(access)
    assert access.reason == ""
    assert REGISTRY.get_sample_value("smallcat_paused") == 0
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    # And closes again, if it comes to that.
    probe.error = PermanentStorageError("denied again")
    with pytest.raises(BucketRefusedError):
        access.judge(10)
    assert access.reason == "denied again"


@pytest.mark.parametrize(
    "error", [StorageError("503"), PermanentStorageError("denied"), RuntimeError("odd")], ids=str
)
def test_whatever_a_try_ends_with_there_is_another(
    access: BucketAccess, probe: Probe, error: Exception
) -> None:
    probe.error = PermanentStorageError("denied")
    with pytest.raises(BucketRefusedError):
        access.judge(10)
    probe.error = error
    wait_for_probe(probe, 5)
    assert access.reason == "denied"
    probe.error = None
    wait_until_open(access)


def test_a_storage_that_is_nearly_full_opens_when_there_is_room_for_what_was_refused(
    access: BucketAccess, probe: Probe
) -> None:
    probe.room = 1_000
    access.judge(500)
    with pytest.raises(BucketRefusedError):
        access.judge(5_000)
    wait_for_probe(probe, 5)
    assert access.reason == "no room"
    assert set(probe.sizes[2:]) == {5_000}
    probe.room = 5_000
    wait_until_open(access)


def test_where_the_storage_fails_nobody_is_to_blame_yet(access: BucketAccess, probe: Probe) -> None:
    probe.error = StorageError("503")
    with pytest.raises(StorageError, match="503") as caught:
        access.judge(10)
    assert type(caught.value) is StorageError
    access.require()


def test_refusals_that_wait_for_a_test_object_share_the_next_one(probe: Probe) -> None:
    """Its answer is newer than all of them."""
    gate, entered = threading.Event(), threading.Semaphore(0)

    def slow(size: int) -> None:
        probe(size)
        assert gate.wait(SOON_S)

    access = BucketAccess(slow)
    lock = access._lock

    class Noting:
        """The lock, which notes who comes to it."""

        def __enter__(self) -> None:
            entered.release()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    access._lock = Noting()  # type: ignore[assignment]
    with ThreadPoolExecutor(32) as threads:
        verdicts = [threads.submit(access.judge, 10) for _ in range(32)]
        wait_for_probe(probe)
        for _ in range(32):
            assert entered.acquire(timeout=SOON_S)
        gate.set()
    assert all(verdict.exception() is None for verdict in verdicts)
    assert len(probe.sizes) == 2


def test_a_refusal_is_not_judged_by_an_older_object(access: BucketAccess, probe: Probe) -> None:
    access.judge(10)
    probe.error = PermanentStorageError("denied")
    with pytest.raises(BucketRefusedError):
        access.judge(10)


def test_a_worker_that_stops_tries_no_more(access: BucketAccess, probe: Probe) -> None:
    probe.error = PermanentStorageError("denied")
    with pytest.raises(BucketRefusedError):
        access.judge(10)
    threads = [thread for thread in threading.enumerate() if thread.name == "bucket access"]
    access.end()
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()
