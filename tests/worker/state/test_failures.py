"""The jobs that failed for good: read in bulk, with jobs that expire or change meanwhile, and dropped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.worker.engine.fake_runner import job_of
from worker.contract.errors import NotFiniteError, UnknownJobError
from worker.contract.job import Job
from worker.contract.message import RunMark
from worker.contract.record import Attempt
from worker.state.failures import CHUNK, Failure, Failures
from worker.state.keys import FAILED, job_key
from worker.state.records import READ_AT_ONCE, Records
from worker.state.redis_client import connect

JOB, OTHER = job_of(1), job_of(2)
MARK = RunMark("abc123", 1, 0, 5, 7).encode()


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def records(client: Redis) -> Records:
    return Records(client, 1_000)


@pytest.fixture
def failures(client: Redis) -> Failures:
    return Failures(client)


def fail(records: Records, job: Job, text: str = "NaN") -> None:
    records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    assert records.failed(job.id, "m1", NotFiniteError(text))


def ids(failures: Failures) -> list[str]:
    return [failure.id for failure in failures.list()]


def test_a_failure_is_what_its_record_says(records: Records, failures: Failures) -> None:
    records.claim(JOB, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q", run=MARK)
    records.give_back(JOB.id, "m1", Attempt(attempt=1, worker="w1", at=1.0, error_type="x", error="y"))
    fail(records, JOB, '"NaN" / \u00fc \u4e2d \x7f\n')
    record = records.get(JOB.id)
    assert len(record.tries) == 2
    assert failures.list() == [
        Failure(JOB.id, "NotFiniteError", '"NaN" / \u00fc \u4e2d \x7f\n', record.tries[-1].at, (MARK,))
    ]


def test_a_failure_that_no_worker_took_is_dated_by_its_submission(
    records: Records, failures: Failures, client: Redis
) -> None:
    records.submitted(JOB, "q")
    client.hset(job_key(JOB.id), mapping={"state": "failed", "error_type": "RenderError", "error": "x"})
    client.zadd(FAILED, {JOB.id: 1})
    assert failures.list() == [Failure(JOB.id, "RenderError", "x", records.get(JOB.id).submitted_at, ())]


@pytest.mark.parametrize("jobs", [(JOB, OTHER), (OTHER, JOB)])
def test_the_latest_is_the_first_within_a_second_too(
    jobs: tuple[Job, Job], records: Records, failures: Failures, client: Redis
) -> None:
    for job in jobs:
        fail(records, job)
    client.zadd(FAILED, {job.id: 1 for job in jobs})
    assert ids(failures) == [job.id for job in reversed(jobs)]
    times = [failure.at for failure in failures.list()]
    assert times == sorted(times, reverse=True)


def test_failed_jobs_are_listed_and_can_be_dropped(records: Records, failures: Failures) -> None:
    for job in (JOB, OTHER):
        fail(records, job)
    assert set(ids(failures)) == {JOB.id, OTHER.id}
    assert failures.drop([JOB.id]) == 1
    assert failures.drop([JOB.id]) == 0
    assert ids(failures) == [OTHER.id]
    with pytest.raises(UnknownJobError):
        records.get(JOB.id)
    # Submitted again, it is no failure any more.
    records.submitted(OTHER, "q")
    assert ids(failures) == []
    assert failures.drop([OTHER.id]) == 0
    assert records.get(OTHER.id).job == OTHER


def test_the_latest_failure_comes_first(records: Records, failures: Failures, client: Redis) -> None:
    jobs = [job_of(seed) for seed in range(5)]
    for job in jobs:
        fail(records, job)
    client.zadd(FAILED, {job.id: number for number, job in enumerate(jobs)})
    assert ids(failures) == [job.id for job in reversed(jobs)]


def test_a_failure_whose_record_expired_is_left_out_and_forgotten(
    records: Records, failures: Failures, client: Redis
) -> None:
    for job in (JOB, OTHER):
        fail(records, job)
    client.delete(job_key(JOB.id))
    assert ids(failures) == [OTHER.id]
    assert client.zscore(FAILED, JOB.id) is None


def test_a_failure_that_is_done_meanwhile_is_none(
    records: Records, failures: Failures, client: Redis
) -> None:
    fail(records, JOB)
    client.hset(job_key(JOB.id), "state", "done")
    assert ids(failures) == []


def test_more_than_one_round_trip_holds_are_read_and_dropped(
    records: Records, failures: Failures, client: Redis
) -> None:
    number = 2 * CHUNK + 1
    with client.pipeline(transaction=False) as pipe:
        for each in range(number):
            pipe.hset(f"smallcat:job:{each}", mapping={"state": "failed", "submitted_at": 1})
            pipe.zadd(FAILED, {f"{each}": each})
            pipe.zadd(FAILED, {f"gone {each}": each})
        pipe.execute()
    assert ids(failures) == [f"{each}" for each in reversed(range(number))]
    assert client.zcard(FAILED) == number
    assert failures.drop([f"{each}" for each in range(number)]) == number
    assert client.dbsize() == 0


def test_records_are_read_in_bulk_in_order_without_unknown_ones(records: Records, client: Redis) -> None:
    jobs = [job_of(seed) for seed in range(2 * READ_AT_ONCE + 1)]
    with client.pipeline(transaction=False) as pipe:
        for job in jobs:
            pipe.hset(
                job_key(job.id), mapping={"state": "queued", "job": job.model_dump_json(), "queue": "q"}
            )
        pipe.hset(job_key("half"), "state", "queued")
        pipe.execute()
    found = records.read([JOB.id, "0" * 32, "half", *(job.id for job in jobs)])
    assert list(found) == [JOB.id, *(job.id for job in jobs if job.id != JOB.id)]
    assert found[JOB.id] == records.get(JOB.id)
    assert records.read([]) == {}
    assert found[jobs[-1].id].job == jobs[-1]
