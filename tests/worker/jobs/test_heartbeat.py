"""A worker's heartbeat, on a real Redis that comes and goes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deploy.embedded.servers import ValkeyProcess
from deploy.embedded.stack import Stack
from tests.worker.engine.fake_runner import SERVED, SOON_S, job_of
from worker.contract.refusals import RefusalLog
from worker.jobs.heartbeat import Heartbeat
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.keys import WORKERS_CHANNEL
from worker.state.records import Claim, Records
from worker.state.redis_client import connect

JOB, OTHER = job_of(1), job_of(2)
INFO = WorkerInfo(
    name="w1", served=SERVED, started_at=1.0, device="CPU", attention="sdpa", max_rows=8, versions={}
)
#: So long that only what is asked for is written.
LEASE_S = 3_600.0


@pytest.fixture(autouse=True)
def _own_refusal_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of refusals is one a process: what earlier tests had refused is not of these."""
    monkeypatch.setattr("worker.jobs.heartbeat.refusal_log", RefusalLog())


class Beating:
    """A heartbeat, its input and its output."""

    def __init__(self, url: str) -> None:
        self.client = connect(url, retry_s=1)
        self.records = Records(self.client, 1_000)
        self.fleet = Fleet(self.client, 1_000)
        self.jobs: dict[str, tuple[int, int]] = {}
        self.cancelled: queue.Queue[str] = queue.Queue()
        self.watched = threading.Semaphore(0)
        self.paused = ""
        self.max_rows = 8
        self.heartbeat = Heartbeat(
            self.records,
            self.fleet,
            INFO,
            lease_s=LEASE_S,
            jobs=lambda: self.jobs,
            cancel=self.cancelled.put,
            watchdog=self.watched.release,
            paused=lambda: self.paused,
            max_rows=lambda: self.max_rows,
        )

    def run(self, *jobs: Any) -> None:
        """Have `jobs` in flight."""
        for job in jobs:
            self.records.submitted(job, "q")
            self.records.claim(job, "m1", worker="w1", lease_s=1, max_attempts=3, queue="q")
            self.jobs[job.id] = (1, 4)

    def wait_until_subscribed(self) -> None:
        """Wait until the heartbeat has subscribed to cancellations."""
        until_true(lambda: self.client.pubsub_numsub(WORKERS_CHANNEL)[0][1] > 0)


def until_true(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does soon."""
    until = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        threading.Event().wait(0.01)


@pytest.fixture
def beating(valkey: ValkeyProcess) -> Iterator[Beating]:
    beating = Beating(valkey.url)
    yield beating
    beating.heartbeat.stop()


def test_a_worker_is_announced_once_it_starts_and_gone_once_it_stops(beating: Beating) -> None:
    assert beating.fleet.workers() == []
    beating.heartbeat.start()
    assert beating.fleet.workers() == [INFO]
    beating.heartbeat.stop()
    assert beating.fleet.workers() == []


def test_the_rows_of_a_step_are_announced_as_they_are_now(
    beating: Beating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.jobs.heartbeat.ANNOUNCE_EVERY_S", 0.01)
    beating.heartbeat.start()
    beating.max_rows = 32
    until_true(lambda: beating.fleet.workers() == [INFO.model_copy(update={"max_rows": 32})])


def test_a_pause_is_announced_at_once_with_its_reason_and_so_is_its_end(
    beating: Beating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.jobs.heartbeat.ANNOUNCE_EVERY_S", 3_600)
    beating.heartbeat.start()
    beating.paused = "the bucket refuses"
    until_true(lambda: beating.fleet.workers() == [INFO.model_copy(update={"paused": "the bucket refuses"})])
    beating.paused = ""
    until_true(lambda: beating.fleet.workers() == [INFO])


def test_a_worker_that_leaves_goes_on_beating_for_its_jobs(beating: Beating) -> None:
    beating.run(JOB)
    beating.heartbeat.start()
    beating.heartbeat.leave()
    until_true(lambda: beating.fleet.workers() == [])
    beating.records.cancel(JOB.id)
    assert beating.cancelled.get(timeout=SOON_S) == JOB.id


def test_claims_are_extended(beating: Beating) -> None:
    beating.run(JOB)
    beating.heartbeat.start()
    until_true(lambda: beating.records.get(JOB.id).steps == 4)
    claim_until = float(beating.client.hget(f"smallcat:job:{JOB.id}", "claim_until") or 0)
    assert claim_until > beating.fleet.now() + LEASE_S / 2
    verdict, *_ = beating.records.claim(JOB, "m2", worker="w2", lease_s=1, max_attempts=3, queue="q")
    assert verdict is Claim.TAKEN


def test_progress_is_written_while_somebody_looks(beating: Beating) -> None:
    beating.heartbeat.start()
    beating.wait_until_subscribed()
    beating.run(JOB, OTHER)
    beating.jobs.update({JOB.id: (2, 4), OTHER.id: (3, 4)})
    beating.records.watch()
    until_true(lambda: beating.records.get(OTHER.id).step == 3)
    assert beating.records.get(JOB.id).step == 2
    beating.jobs[JOB.id] = (3, 4)
    until_true(lambda: beating.records.get(JOB.id).step == 3)


def test_a_cancellation_is_passed_on_at_once_for_that_job_only(beating: Beating) -> None:
    beating.heartbeat.start()
    beating.wait_until_subscribed()
    beating.run(JOB, OTHER)
    beating.records.cancel(JOB.id)
    assert beating.cancelled.get(timeout=SOON_S) == JOB.id
    assert beating.cancelled.empty()


def test_a_cancellation_that_was_published_before_anyone_subscribed_is_found_at_the_next_beat(
    beating: Beating,
) -> None:
    beating.run(JOB)
    beating.records.cancel(JOB.id)
    beating.heartbeat.start()
    assert beating.cancelled.get(timeout=SOON_S) == JOB.id


def test_a_job_that_was_submitted_again_since_is_not_cancelled(beating: Beating) -> None:
    beating.heartbeat.start()
    beating.wait_until_subscribed()
    beating.run(JOB, OTHER)
    # The word of a cancellation that arrives late, and one of a job that runs elsewhere.
    beating.client.publish(WORKERS_CHANNEL, f"cancel {JOB.id}")
    beating.client.publish(WORKERS_CHANNEL, f"cancel {job_of(9).id}")
    beating.records.cancel(OTHER.id)
    assert beating.cancelled.get(timeout=SOON_S) == OTHER.id
    assert beating.cancelled.empty()


@pytest.mark.parametrize("word", ["", "cancel", "nonsense", "cancel  ", "watch out"])
def test_words_it_does_not_know_do_not_stop_it(beating: Beating, word: str) -> None:
    beating.heartbeat.start()
    beating.wait_until_subscribed()
    beating.run(JOB)
    beating.client.publish(WORKERS_CHANNEL, word)
    beating.records.cancel(JOB.id)
    assert beating.cancelled.get(timeout=SOON_S) == JOB.id


def test_it_survives_the_loss_of_its_connections(beating: Beating, valkey: ValkeyProcess) -> None:
    beating.heartbeat.start()
    beating.wait_until_subscribed()
    beating.run(JOB)
    with connect(valkey.url, retry_s=2) as other:
        other.client_kill_filter(_type="pubsub", skipme=True)
        other.client_kill_filter(_type="normal", skipme=True)
    beating.records.cancel(JOB.id)
    # Perhaps published while nobody was subscribed: then it is asked for again.
    until_true(lambda: beating.records.watch() or not beating.cancelled.empty())  # type: ignore[func-returns-value]
    assert beating.cancelled.get() == JOB.id


def test_the_watchdog_goes_on_while_redis_is_away_and_the_worker_is_announced_once_it_is_back(
    new_stack: Callable[..., Stack], caplog: pytest.LogCaptureFixture
) -> None:
    valkey = new_stack(workers=0).valkey
    beating = Beating(valkey.url)
    valkey.kill()
    beating.heartbeat.start()
    try:
        assert "is out of reach" in caplog.text
        for _ in range(3):
            assert beating.watched.acquire(timeout=SOON_S)
        valkey.start()
        until_true(lambda: beating.fleet.workers() == [INFO])
        ours = [each.getMessage() for each in caplog.records if each.name == "smallcat.redis"]
        assert sum("is out of reach" in each for each in ours) == 1
    finally:
        beating.heartbeat.stop()
