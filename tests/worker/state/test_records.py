"""A job's state in Redis: every verdict a worker can get, every end a job can have, and that nothing stays.

Against a real server: what is promised here is promised by its scripts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from deploy.embedded.servers import ValkeyProcess
from tests.worker.engine.fake_runner import SOON_S, job_of
from worker.contract.errors import (
    JobCancelledError,
    NotFiniteError,
    PermanentStorageError,
    SmallcatError,
    StorageError,
    UnknownJobError,
)
from worker.contract.job import Job
from worker.contract.record import Attempt, JobRecord, State, Timings
from worker.state import scripts
from worker.state.failures import Failures
from worker.state.keys import job_key, run_key
from worker.state.records import RECHECK_S, Claim, Records
from worker.state.redis_client import connect

JOB = job_of(1, metadata={"mine": ["ä", 1]})
QUEUE = "smallcat.fake@ffff"
TTL_S = 1_000


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def records(client: Redis) -> Records:
    return Records(client, TTL_S)


def claim(records: Records, message: str = "m1", job: Job = JOB, **options: Any) -> tuple[Claim, int]:
    given = {"worker": "w1", "lease_s": 30.0, "max_attempts": 3, "queue": QUEUE} | options
    verdict, attempt, queued_s = records.claim(job, message, **given)
    assert queued_s is None or 0 <= queued_s <= TTL_S
    return verdict, attempt


def done(job: Job = JOB, **fields: Any) -> JobRecord:
    return JobRecord(
        id=job.id,
        state=State.DONE,
        job=job,
        step=4,
        steps=4,
        uri="s3://bucket/picture",
        timings=Timings(queued=0.5, rendered=1.5, uploaded=0.25),
        worker="w1",
        warnings=("cut",),
        nsfw=False,
        **fields,
    )


def failure(attempt: int) -> Attempt:
    return Attempt(attempt=attempt, worker="w1", at=1.0, error_type="RenderError", error="once")


def test_a_submitted_job_is_queued_with_all_it_said(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    record = records.get(JOB.id)
    assert (record.state, record.job, record.queue) == (State.QUEUED, JOB, QUEUE)
    assert (record.attempts, record.step, record.steps, record.uri) == (0, 0, 0, None)
    assert record.submitted_at == pytest.approx(time.time(), abs=60)


def test_an_unknown_job_is_an_error(records: Records) -> None:
    for ask in (records.get, records.cancel, lambda job_id: records.wait(job_id, 1)):
        with pytest.raises(UnknownJobError, match="no record of a job nonsense"):
            ask("nonsense")


# --- claims -----------------------------------------------------------------------------------------------


def test_the_first_message_renders(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    assert claim(records) == (Claim.RENDER, 1)
    record = records.get(JOB.id)
    assert (record.state, record.worker, record.attempts) == (State.RUNNING, "w1", 1)


def test_a_job_whose_record_expired_is_rendered_all_the_same(records: Records) -> None:
    assert claim(records) == (Claim.RENDER, 1)
    assert records.get(JOB.id).job == JOB
    assert records.get(JOB.id).queue == QUEUE


def test_the_same_message_takes_its_claim_over_at_once(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    claim(records, worker="killed")
    assert claim(records, worker="next") == (Claim.RENDER, 2)
    assert records.get(JOB.id).worker == "next"


def test_for_another_message_the_job_is_taken(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    claim(records, "m1")
    assert claim(records, "m2") == (Claim.TAKEN, 0)
    assert records.get(JOB.id).attempts == 1


def test_another_message_takes_over_once_the_lease_is_over(records: Records) -> None:
    claim(records, "m1", lease_s=0.0)
    assert claim(records, "m2") == (Claim.RENDER, 2)


def test_progress_extends_the_claim(records: Records) -> None:
    claim(records, "m1", lease_s=0.0)
    records.progress({JOB.id: (1, 4)}, lease_s=30.0)
    assert claim(records, "m2") == (Claim.TAKEN, 0)


def test_a_job_that_was_taken_too_often_is_poison(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    assert [claim(records)[0] for _ in range(4)] == [Claim.RENDER] * 3 + [Claim.POISON]
    assert records.failed(JOB.id, "m1", SmallcatError("poison"))
    assert claim(records)[0] is Claim.FINAL
    assert records.get(JOB.id).attempts == 3


def test_each_try_is_on_record(records: Records) -> None:
    claim(records, worker="w1")
    records.give_back(JOB.id, "m1", failure(1))
    claim(records, worker="w2")
    first, second = records.get(JOB.id).tries
    assert (first.attempt, first.worker, first.error) == (1, "w1", "once")
    assert (second.attempt, second.worker, second.error) == (2, "w2", None)


def test_a_claim_whose_answer_was_lost_is_not_counted_twice(records: Records, client: Redis) -> None:
    """redis-py sends a command again when the connection was lost before its answer came."""
    records.submitted(JOB, QUEUE)
    script = records._claim
    answers = []

    def lose_one_answer(**call: Any) -> Any:
        answers.append(script(**call))
        answers.append(script(**call))
        return answers[-1]

    records._claim = lose_one_answer  # type: ignore[assignment]
    assert claim(records) == (Claim.RENDER, 1)
    assert [answer[:2] for answer in answers] == [["render", 1], ["render", 1]]
    assert records.get(JOB.id).attempts == 1


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
def test_a_final_job_is_not_rendered_again_for_a_late_message(records: Records, end: str) -> None:
    records.submitted(JOB, QUEUE)
    finish(records, end)
    before = records.get(JOB.id)
    assert claim(records, "m2") == (Claim.FINAL, 0)
    assert records.get(JOB.id) == before


def finish(records: Records, end: str) -> None:
    """Bring a queued job to that end."""
    if end == "cancelled":
        records.cancel(JOB.id)
    else:
        claim(records)
        assert records.done(done()) if end == "done" else records.failed(JOB.id, "m1", NotFiniteError("NaN"))
    assert records.get(JOB.id).state == end


# --- ends -------------------------------------------------------------------------------------------------


def test_a_done_record_holds_all_there_is_to_know(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    claim(records)
    assert records.done(done())
    record = records.get(JOB.id)
    given = done().model_dump(exclude={"submitted_at", "queue", "attempts", "tries"})
    assert record.model_dump(exclude={"submitted_at", "queue", "attempts", "tries"}) == given
    assert (record.attempts, record.queue) == (1, QUEUE)
    record.raise_for_state()


def test_done_is_written_once(records: Records) -> None:
    claim(records)
    assert records.done(done())
    assert not records.done(done(cached=True))
    assert not records.get(JOB.id).cached


@pytest.mark.parametrize("state", ["running", "done", "cancelled"])
def test_the_done_mark_acknowledges_the_message_in_the_same_step(
    records: Records, client: Redis, state: str
) -> None:
    """Nobody delivers it again; others stay. Sent again, because the answer was lost, it harms nothing."""
    records = Records(client, 1_000, held=("held:index", "held"))
    claim(records)
    if state == "done":
        records.done(done())
    elif state == "cancelled":
        client.hset(job_key(JOB.id), "state", "cancelled")
    client.zadd("held:index", {"t1": 1, "t2": 2})
    client.hset("held", mapping={"t1": "x", "t2": "y"})
    assert records.done(done(), "t1") is (state == "running")
    assert not records.done(done(), "t1")
    assert client.zrange("held:index", 0, -1) == client.hkeys("held") == ["t2"]


def test_a_failure_acknowledges_nothing_by_itself(client: Redis) -> None:
    """It may be tried again: the message says so."""
    records = Records(client, 1_000, held=("held:index", "held"))
    claim(records, "m1/t1")
    client.zadd("held:index", {"t1": 1})
    assert records.failed(JOB.id, "m1/t1", NotFiniteError("NaN"))
    assert client.zcard("held:index") == 1


@pytest.mark.parametrize(
    ("error", "state", "kind"),
    [
        (NotFiniteError("NaN at step 3"), State.FAILED, NotFiniteError),
        (PermanentStorageError("no bucket"), State.FAILED, StorageError),
        (JobCancelledError("The job was cancelled."), State.CANCELLED, JobCancelledError),
    ],
)
def test_a_failed_job_raises_its_own_error(
    records: Records, error: SmallcatError, state: State, kind: type[SmallcatError]
) -> None:
    claim(records)
    if state is State.CANCELLED:
        records.cancel(JOB.id)
    assert records.failed(JOB.id, "m1", error)
    record = records.get(JOB.id)
    assert (record.state, record.error_type, record.error) == (state, type(error).__name__, str(error))
    with pytest.raises(kind, match=str(error)):
        record.raise_for_state()


def test_a_picture_is_done_even_after_a_failure_was_written(records: Records, client: Redis) -> None:
    claim(records, "m1")
    assert records.failed(JOB.id, "m1", NotFiniteError("NaN"))
    assert records.done(done())
    record = records.get(JOB.id)
    assert (record.state, record.error, record.error_type) == (State.DONE, None, None)
    assert Failures(client).list() == []


def test_a_failure_from_a_message_that_lost_its_claim_changes_nothing(records: Records) -> None:
    claim(records, "m1", lease_s=0.0)
    claim(records, "m2")
    before = records.get(JOB.id)
    assert not records.failed(JOB.id, "m1", NotFiniteError("late"))
    records.give_back(JOB.id, "m1", failure(1))
    records.give_back(JOB.id, "m1")
    assert records.get(JOB.id) == before


def test_giving_back_undoes_the_attempt(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    claim(records, "m1")
    records.progress({JOB.id: (3, 4)}, lease_s=30)
    records.give_back(JOB.id, "m1")
    record = records.get(JOB.id)
    assert (record.state, record.attempts, record.tries, record.step) == (State.QUEUED, 0, (), 0)
    # Any message may have it now.
    assert claim(records, "m2") == (Claim.RENDER, 1)


def test_a_death_counts_with_its_attempt_or_without(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    claim(records, "m1")
    records.give_back(JOB.id, "m1", died=True)
    record = records.get(JOB.id)
    assert (record.state, record.attempts, record.tries) == (State.QUEUED, 0, ())
    assert records.attempts_and_deaths(JOB.id) == (0, 1)
    claim(records, "m1")
    records.give_back(JOB.id, "m1", failure(1), died=True)
    record = records.get(JOB.id)
    assert (record.state, record.attempts, record.tries) == (State.QUEUED, 1, (failure(1),))
    assert records.attempts_and_deaths(JOB.id) == (1, 2)
    # Any message may have it now.
    assert claim(records, "m2") == (Claim.RENDER, 2)


def test_giving_back_a_poison_job_undoes_no_attempt(records: Records) -> None:
    """As when Redis fails just when its failure is written."""
    for _ in range(3):  # As by workers that were killed.
        claim(records)
    assert claim(records) == (Claim.POISON, 3)
    records.give_back(JOB.id, "m1")
    assert claim(records) == (Claim.POISON, 3)


def test_workers_go_on_while_redis_is_full_and_so_make_room(records: Records, client: Redis) -> None:
    others = [job_of(seed) for seed in range(2, 5)]
    for job in (JOB, *others):
        records.submitted(job, QUEUE)
    client.config_set("maxmemory", 1)
    try:
        assert claim(records) == (Claim.RENDER, 1)
        assert records.progress({JOB.id: (1, 4)}, lease_s=30) == []
        assert records.done(done())
        claim(records, job=others[0])
        assert records.failed(others[0].id, "m1", NotFiniteError("NaN"))
        claim(records, job=others[1])
        records.give_back(others[1].id, "m1", failure(1))
        claim(records, job=others[2])
        assert records.cancel(others[2].id) is State.RUNNING
        with pytest.raises(OutOfMemoryError):
            records.submitted(job_of(5), QUEUE)
    finally:
        client.config_set("maxmemory", 0)
    assert records.get(JOB.id).state is State.DONE
    assert [records.get(job.id).state for job in others] == [State.FAILED, State.QUEUED, State.RUNNING]


def test_a_failed_attempt_counts_and_the_job_waits_for_the_next(records: Records) -> None:
    claim(records, "m1")
    records.give_back(JOB.id, "m1", failure(1))
    assert (records.get(JOB.id).state, records.get(JOB.id).attempts) == (State.QUEUED, 1)
    assert claim(records, "m1") == (Claim.RENDER, 2)


# --- submitting again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
def test_submitting_a_final_job_again_starts_it_anew(records: Records, end: str) -> None:
    records.submitted(JOB, QUEUE)
    finish(records, end)
    records.submitted(JOB, "another")
    record = records.get(JOB.id)
    assert (record.state, record.attempts, record.tries, record.queue) == (State.QUEUED, 0, (), "another")
    assert (record.error, record.error_type, record.uri, record.step) == (None, None, None, 0)
    assert claim(records, "m2") == (Claim.RENDER, 1)


def test_submitting_a_job_in_flight_leaves_it_as_it_is(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    queued = records.get(JOB.id)
    records.submitted(JOB, QUEUE)
    assert records.get(JOB.id) == queued
    claim(records)
    running = records.get(JOB.id)
    records.submitted(JOB, QUEUE)
    assert records.get(JOB.id) == running


def test_a_job_submitted_again_while_its_cancellation_is_on_its_way_is_not_cancelled(
    records: Records,
) -> None:
    records.submitted(JOB, QUEUE)
    claim(records, "m1")
    records.cancel(JOB.id)
    records.submitted(JOB, QUEUE)
    # The worker learns of the cancellation only now.
    assert not records.failed(JOB.id, "m1", JobCancelledError("The job was cancelled."))
    assert records.get(JOB.id).state is State.QUEUED
    assert claim(records, "m2") == (Claim.RENDER, 1)


# --- cancelling -------------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_at_once(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    assert records.cancel(JOB.id) is State.CANCELLED
    with pytest.raises(JobCancelledError):
        records.get(JOB.id).raise_for_state()
    assert claim(records) == (Claim.FINAL, 0)


def test_a_running_job_is_cancelled_by_its_worker(records: Records) -> None:
    other = job_of(2)
    claim(records)
    claim(records, "m2", job=other)
    assert records.cancel(JOB.id) is State.RUNNING
    assert records.progress({other.id: (1, 4), JOB.id: (2, 4)}, lease_s=30) == [JOB.id]
    assert records.get(JOB.id).step == 2


def test_a_running_job_whose_worker_died_is_cancelled_when_its_message_comes_again(records: Records) -> None:
    claim(records)
    records.cancel(JOB.id)
    assert claim(records) == (Claim.FINAL, 0)
    assert records.get(JOB.id).state is State.CANCELLED
    # Its first worker was not dead after all: what it reports now changes nothing.
    records.give_back(JOB.id, "m1")
    assert records.get(JOB.id).state is State.CANCELLED


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
def test_cancelling_a_final_job_changes_nothing(records: Records, end: str) -> None:
    records.submitted(JOB, QUEUE)
    finish(records, end)
    before = records.get(JOB.id)
    assert records.cancel(JOB.id) == end
    assert records.get(JOB.id) == before


def test_progress_of_what_is_not_running_is_not_written(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    assert records.progress({JOB.id: (3, 4), "unknown": (1, 2)}, lease_s=30) == []
    assert records.get(JOB.id).step == 0
    with pytest.raises(UnknownJobError):
        records.get("unknown")
    assert records.progress({}, lease_s=30) == []


# --- waiting ----------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def waiting(pool: ThreadPoolExecutor, records: Records, client: Redis) -> Future[JobRecord]:
    """Somebody who waits for `JOB`, asleep by now."""
    future = pool.submit(records.wait, JOB.id, SOON_S)
    until = time.monotonic() + SOON_S
    while client.pubsub_numsub(job_key(JOB.id))[0][1] == 0:
        assert time.monotonic() < until, "nobody waits"
        threading.Event().wait(0.005)
    return future


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
def test_who_waits_is_woken_at_once(
    records: Records, client: Redis, pool: ThreadPoolExecutor, end: str
) -> None:
    records.submitted(JOB, QUEUE)
    future = waiting(pool, records, client)
    began = time.monotonic()
    finish(records, end)
    assert future.result(SOON_S).state == end
    assert time.monotonic() - began < RECHECK_S / 2


def test_who_waits_for_what_has_ended_does_not_wait(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    finish(records, "done")
    assert records.wait(JOB.id, 0).state is State.DONE


def test_who_waits_survives_the_loss_of_the_connection(
    records: Records, client: Redis, pool: ThreadPoolExecutor
) -> None:
    records.submitted(JOB, QUEUE)
    future = waiting(pool, records, client)
    client.client_kill_filter(_type="pubsub")
    finish(records, "done")
    assert future.result(SOON_S).state is State.DONE


def test_waiting_too_long_is_an_error_that_names_the_job_s_state(records: Records) -> None:
    records.submitted(JOB, QUEUE)
    with pytest.raises(TimeoutError, match=f"Job {JOB.id} is still queued after 0.05 s"):
        records.wait(JOB.id, 0.05)


def test_who_waits_for_long_is_asked_now_and_then(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.state.records.RECHECK_S", 0.01)
    records.submitted(JOB, QUEUE)
    seen: list[State] = []

    def idle(record: JobRecord) -> None:
        seen.append(record.state)
        if len(seen) == 2:
            finish(records, "done")

    assert records.wait(JOB.id, SOON_S, idle).state is State.DONE
    assert seen == [State.QUEUED, State.QUEUED]


# --- nothing stays ----------------------------------------------------------------------------------------


def all_keys_expire(client: Redis) -> bool:
    keys = list(client.scan_iter())
    assert keys
    return all(0 < client.ttl(each) <= TTL_S for each in keys)


@pytest.mark.parametrize("end", ["done", "failed", "cancelled", "running", "given back", "retried", "queued"])
@pytest.mark.parametrize("submitted", [True, False])
def test_every_key_expires(records: Records, client: Redis, end: str, submitted: bool) -> None:
    if submitted or end in ("cancelled", "queued"):
        records.submitted(JOB, QUEUE)
    if end in ("done", "failed", "cancelled"):
        finish(records, end)
    elif end != "queued":
        claim(records)
        records.progress({JOB.id: (1, 4)}, lease_s=30)
    if end == "given back":
        records.give_back(JOB.id, "m1")
    if end == "retried":
        records.give_back(JOB.id, "m1", failure(1))
    assert all_keys_expire(client)


def test_a_picture_that_is_done_after_its_record_expired_leaves_one_that_expires(
    records: Records, client: Redis
) -> None:
    assert records.done(done())
    assert records.get(JOB.id).state is State.DONE
    assert all_keys_expire(client)
    assert not records.failed("another", "m1", NotFiniteError("NaN"))
    assert all_keys_expire(client)


def test_the_script_that_marks_runs_has_the_keys_that_python_has() -> None:
    text = (Path(scripts.__file__).parent / "mark_runs.lua").read_text()
    assert f"local key = '{run_key('')}' .. run" in text
    assert f"string.len('{job_key('')}')" in text


@pytest.mark.parametrize(
    "said", ["nan", "inf", "-inf", "1e400", "-1e308", "1e308", "-1e12", "1e12", "0", "x"]
)
def test_a_time_of_submission_that_cannot_be_right_is_not_known(
    said: str, records: Records, client: Redis
) -> None:
    """Producers can write it. A word is none at all: the job counts as submitted now."""
    client.hset(job_key(JOB.id), mapping={"state": "queued", "submitted_at": said})
    given: dict[str, Any] = {"worker": "w1", "lease_s": 30.0, "max_attempts": 3, "queue": QUEUE}
    verdict, attempt, queued_s = records.claim(JOB, "m1", **given)
    assert (verdict, attempt, queued_s) == (Claim.RENDER, 1, 0.0 if said == "x" else None)
