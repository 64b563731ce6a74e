"""A finished job's record stays in Redis for an hour; then producers read it from the bucket."""

from __future__ import annotations

import asyncio

import pytest
from redis import Redis

from producer import JobHandle, submit_job
from producer.session import session
from tests.producer.test_client import client, environment, finish, fleet, records, storage
from worker.contract.errors import PermanentStorageError, RenderError, UnknownJobError
from worker.contract.record import JobRecord, State
from worker.state.fleet import Fleet
from worker.state.records import Records
from worker.storage.bucket import Bucket

__all__ = ["client", "environment", "fleet", "records", "storage"]


def expire(client: Redis, handle: JobHandle) -> None:
    """What an hour does."""
    client.delete(f"smallcat:job:{handle.id}")


def test_a_done_job_s_record_stays_an_hour_and_its_submission_as_long_as_ever(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    handle = submit_job("a small cat", seed=3)
    finish(records, storage, handle.record().job)
    ttl_s = session().settings.record_ttl_s
    assert 0 < client.ttl(f"smallcat:job:{handle.id}") <= min(3_600, records._ttl_s)
    assert ttl_s - 60 < client.ttl(f"smallcat:job:{handle.id}:{handle.submission}") <= ttl_s


def test_a_failed_job_s_record_stays_as_long_as_ever(fleet: Fleet, records: Records, client: Redis) -> None:
    job = submit_job("a small cat", seed=3).record().job
    long = Records(client, 100_000)
    long.claim(job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    long.failed(job.id, "m1", RenderError("x"))
    assert client.ttl(f"smallcat:job:{job.id}") > 90_000


def test_each_submission_has_its_own_metadata_after_the_hour(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    one, other = (submit_job("a small cat", seed=3, metadata={"of": name}) for name in ("one", "other"))
    finish(records, storage, one.record().job)
    expire(client, one)
    for handle, name in ((one, "one"), (other, "other")):
        again = JobHandle(handle.id, handle.submission)
        assert again.result(5).job.metadata == {"of": name}
        assert asyncio.run(JobHandle(handle.id, handle.submission).aresult(5)).job.metadata == {"of": name}
        assert (again.state(), again.cancel()) == (State.DONE, State.DONE)
    with pytest.raises(UnknownJobError):
        JobHandle(one.id, "0" * 16).cancel()


def test_a_job_that_was_done_stays_so_when_others_submit_it_after_the_hour(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    first = submit_job("a small cat", seed=3)
    finish(records, storage, first.record().job)
    expire(client, first)
    second = submit_job("a small cat", seed=3)
    assert (first.state(), second.state()) == (State.DONE, State.QUEUED)
    assert first.result(5).uri == storage.uri(first.id, first.record().job.format)
    assert asyncio.run(first.aresult(5)).state is State.DONE
    second.cancel()
    assert first.state() is State.DONE


def test_a_job_that_failed_follows_whoever_submits_it_again(
    fleet: Fleet, records: Records, client: Redis
) -> None:
    first = submit_job("a small cat", seed=3)
    job = first.record().job
    records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    records.failed(job.id, "m1", RenderError("x"))
    submit_job("a small cat", seed=3)
    assert first.state() is State.QUEUED
    assert first.cancel() is State.QUEUED


def test_a_record_that_somebody_deleted_is_no_done_job(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    """A producer can. The job is rendered all the same, and is not done before."""
    handle = submit_job("a small cat", seed=3)
    job = handle.record().job
    expire(client, handle)
    records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    assert handle.state() is State.RUNNING
    with pytest.raises(TimeoutError):
        handle.result(0.1)
    with pytest.raises(TimeoutError):
        asyncio.run(handle.aresult(0.1))
    finish(records, storage, job)
    assert handle.result(5).state is State.DONE


def test_without_rights_to_the_bucket_a_sentence_says_where_the_record_is(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = submit_job("a small cat", seed=3)
    finish(records, storage, handle.record().job)
    expire(client, handle)

    def refuse(*_: object) -> bytes:
        raise PermanentStorageError("access denied")

    monkeypatch.setattr(Bucket, "record", refuse)
    with pytest.raises(PermanentStorageError, match=r"stays for an hour.*access denied"):
        handle.result(5)
    with pytest.warns(UserWarning, match="access denied"):
        assert session().latest(5) == []
    monkeypatch.setattr(type(session()), "bucket", None)
    with pytest.raises(UnknownJobError, match="where S3_BUCKET names it"):
        handle.state()


def test_a_done_job_has_all_its_steps_after_the_hour(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    """The record in the bucket is written before the last step is reported."""
    handle = submit_job("a small cat", seed=3)
    job = handle.record().job
    record = JobRecord(id=job.id, state=State.DONE, job=job, uri="s3://b/x.png", step=0, steps=20)
    storage.put(job.id, job.format, b"picture", record.model_dump_json().encode(), "image/png")
    expire(client, handle)
    seen = handle.progress()
    assert (seen.step, seen.steps, seen.fraction) == (20, 20, 1.0)
