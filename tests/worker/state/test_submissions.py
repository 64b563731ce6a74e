"""Equal jobs share the render and nothing else: submissions of one job, runs of prompt files among them.

Against a real server: what is promised here is promised by its scripts.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError, ResponseError

from deploy.embedded.servers import ValkeyProcess
from tests.worker.engine.fake_runner import SOON_S, job_of
from worker.contract.errors import JobCancelledError, NotFiniteError, UnknownJobError
from worker.contract.job import Job
from worker.contract.record import JobRecord, State
from worker.state.keys import attempts_key, job_key, run_key, submission_key
from worker.state.records import Claim, Records
from worker.state.redis_client import connect

JOB = job_of(1, metadata={"whose": "mine"})
OTHERS = JOB.model_copy(update={"metadata": {"whose": "others"}, "priority": 9})
CANCELLED = JobCancelledError("The job was cancelled.")
TTL_S = 1_000
RUN = "r1"


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def records(client: Redis) -> Records:
    return Records(client, TTL_S)


def submit(records: Records, submission: str, job: Job = JOB) -> None:
    records.submitted(job, "q", submission)


def claim(records: Records, message: str = "m1", run: str = "") -> Claim:
    return records.claim(JOB, message, worker="w1", lease_s=30, max_attempts=3, queue="q", run=run)[0]


def done(records: Records) -> bool:
    return records.done(JobRecord(id=JOB.id, state=State.DONE, job=JOB, uri="s3://bucket/x"))


def begin_run(client: Redis) -> str:
    """A run that has sent the job. Returns its mark."""
    client.hset(run_key(RUN), mapping={"fed": 1, "ttl": TTL_S})
    seconds, _ = client.time()
    return f"{RUN}:0:0:1:{int(seconds)}"


def ended_for_run(client: Redis) -> str:
    bits = {part: client.getbit(f"{run_key(RUN)}:{part}", 0) for part in ("done", "failed")}
    return "".join(part for part, bit in bits.items() if bit)


# --- what is a submission's own ---------------------------------------------------------------------------


def test_each_submission_has_its_own_metadata_and_priority(records: Records) -> None:
    submit(records, "a")
    submit(records, "b", OTHERS)
    assert records.submission(JOB.id, "a") == ({"metadata": {"whose": "mine"}, "priority": 5}, False)
    assert records.submission(JOB.id, "b") == ({"metadata": {"whose": "others"}, "priority": 9}, False)
    assert records.submission(JOB.id, "unknown") == ({}, False)


def test_metadata_comes_back_untouched_also_after_it_was_given_up(records: Records) -> None:
    job = JOB.model_copy(update={"metadata": {"id": 2**53 + 1, "text": "ä\x00\u202e", "none": None}})
    submit(records, "a", job)
    submit(records, "b")
    records.cancel(JOB.id, "a")
    assert records.submission(JOB.id, "a") == ({"metadata": job.metadata, "priority": 5}, True)


@pytest.mark.parametrize(
    "text", ["", "-", "+[]", "+{", '+{"prompt":1}', '+{"priority":99}', "+" + "[" * 9_999]
)
def test_a_submission_s_text_that_cannot_be_read_is_none(records: Records, client: Redis, text: str) -> None:
    client.set(submission_key(JOB.id, "a"), text)
    assert records.submission(JOB.id, "a")[0] == {}


# --- giving up --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [False, True], ids=["queued", "running"])
@pytest.mark.parametrize("first", ["a", "b"])
def test_giving_up_leaves_the_job_to_the_others(records: Records, first: str, runs: bool) -> None:
    last = "ab".replace(first, "")
    submit(records, "a")
    submit(records, "b")
    if runs:
        claim(records)
    state = State.RUNNING if runs else State.QUEUED
    for _ in range(2):
        assert records.cancel(JOB.id, first) is State.CANCELLED
        assert records.get(JOB.id, first).state is State.CANCELLED
        assert records.get(JOB.id, last).state is records.get(JOB.id).state is state
    with pytest.raises(JobCancelledError):
        records.wait(JOB.id, SOON_S, submission=first).raise_for_state()
    # The last one stops the render.
    assert records.cancel(JOB.id, last) is (State.RUNNING if runs else State.CANCELLED)
    assert records.progress({JOB.id: (1, 4)}, lease_s=30) == [JOB.id]
    if runs:
        assert records.failed(JOB.id, "m1", CANCELLED)
    for seen in (records.get(JOB.id), *(records.get(JOB.id, each) for each in "ab")):
        assert seen.state is State.CANCELLED


def test_who_gave_up_sees_no_picture_that_others_got(records: Records) -> None:
    submit(records, "a")
    submit(records, "b")
    claim(records)
    records.cancel(JOB.id, "a")
    assert done(records)
    assert records.cancel(JOB.id, "a") is State.CANCELLED
    assert (records.get(JOB.id, "a").state, records.get(JOB.id, "a").uri) == (State.CANCELLED, None)
    assert records.get(JOB.id, "b").state is State.DONE
    assert records.cancel(JOB.id, "b") is State.DONE


def test_a_submission_that_is_done_stays_so_when_the_job_is_submitted_again(records: Records) -> None:
    submit(records, "a")
    claim(records)
    assert done(records)
    submit(records, "b")
    assert records.cancel(JOB.id, "a") is State.DONE
    assert records.get(JOB.id, "b").state is State.QUEUED
    assert records.cancel(JOB.id, "b") is State.CANCELLED
    assert records.get(JOB.id, "a").state is State.DONE
    assert records.wait(JOB.id, SOON_S, submission="a").state is State.DONE


def test_who_waits_for_a_submission_is_woken_when_it_is_given_up(records: Records) -> None:
    submit(records, "a")
    submit(records, "b")
    found: list[JobRecord] = []
    waiting = threading.Thread(target=lambda: found.append(records.wait(JOB.id, 60, submission="a")))
    waiting.start()
    records.cancel(JOB.id, "a")
    waiting.join(SOON_S)
    assert [record.state for record in found] == [State.CANCELLED]


def test_cancelling_the_job_cancels_all_that_want_it(records: Records, client: Redis) -> None:
    mark = begin_run(client)
    submit(records, "a")
    submit(records, "b")
    claim(records, run=mark)
    assert records.cancel(JOB.id) is State.RUNNING
    assert records.failed(JOB.id, "m1", CANCELLED)
    assert {records.get(JOB.id, each).state for each in ("", "a", "b")} == {State.CANCELLED}
    assert ended_for_run(client) == "failed"


def test_a_submission_counts_once_however_often_it_is_sent(records: Records) -> None:
    """redis-py sends a command again when the connection was lost before its answer came."""
    submit(records, "a")
    submit(records, "b")
    submit(records, "b")
    assert records.cancel(JOB.id, "b") is State.CANCELLED
    assert records.get(JOB.id).state is State.QUEUED
    assert records.cancel(JOB.id, "a") is State.CANCELLED
    assert records.get(JOB.id).state is State.CANCELLED


# --- cancel, submit again, cancel again -------------------------------------------------------------------


@pytest.mark.parametrize("runs", [False, True], ids=["queued", "running"])
def test_a_cancelled_submission_stays_cancelled_when_another_one_follows(
    records: Records, runs: bool
) -> None:
    submit(records, "a")
    if runs:
        claim(records)
    records.cancel(JOB.id, "a")
    submit(records, "b")
    assert records.cancel(JOB.id, "a") is State.CANCELLED
    assert records.get(JOB.id, "a").state is State.CANCELLED
    assert records.get(JOB.id, "b").state is State.QUEUED
    # The render that was to stop reports: it is not the new submission's.
    assert not records.failed(JOB.id, "m1", CANCELLED)
    assert claim(records, "m2") is Claim.RENDER
    assert records.get(JOB.id).attempts == 1
    assert done(records)
    assert (records.get(JOB.id, "a").state, records.get(JOB.id, "b").state) == (State.CANCELLED, State.DONE)


def test_a_worker_that_stopped_a_job_that_is_wanted_again_gives_it_back(records: Records) -> None:
    """Two messages of one worker share a render: the second may get the cancellation of the first."""
    submit(records, "a")
    claim(records, "m1")
    records.cancel(JOB.id, "a")
    submit(records, "b")
    claim(records, "m2")
    assert not records.cancelled(JOB.id, "m2", CANCELLED)
    records.give_back(JOB.id, "m2")
    assert records.get(JOB.id, "b").state is State.QUEUED


def test_a_picture_that_comes_after_cancelled_was_said_changes_nothing(records: Records) -> None:
    submit(records, "a")
    claim(records, "m1")
    assert records.cancel(JOB.id, "a") is State.RUNNING
    submit(records, "b")
    assert records.cancel(JOB.id, "b") is State.CANCELLED
    # The first render goes on until its worker gets the cancellation.
    assert records.progress({JOB.id: (1, 4)}, lease_s=30) == [JOB.id]
    assert not done(records)
    assert records.get(JOB.id, "b").state is State.CANCELLED
    submit(records, "c")
    assert records.get(JOB.id, "c").state is State.QUEUED


def test_what_cancel_says_is_true_whatever_happens_beside_it(records: Records, client: Redis) -> None:
    """Random moves of three callers and a worker with a message for each submission."""
    rng = random.Random(16)
    said: dict[str, State] = {}
    live: list[str] = []
    messages: list[str] = []
    held: dict[str, bool] = {}

    def move_caller(number: int) -> None:
        if live and rng.random() < 0.5:
            submission = rng.choice([*live, *said])
            state = records.cancel(JOB.id, submission)
            if said.get(submission) in (State.CANCELLED, State.DONE):
                assert state is said[submission]
            said[submission] = state
        else:
            live.append(f"s{number}")
            submit(records, live[-1])
            messages.append(live[-1])

    def move_worker() -> None:
        if held and rng.random() < 0.6:
            message = rng.choice(list(held))
            outcome = rng.random()
            if outcome < 0.4:
                done(records)
                del held[message]
            elif outcome < 0.7 and records.progress({JOB.id: (1, 4)}, 30):
                del held[message]
                if not records.cancelled(JOB.id, message, CANCELLED):
                    records.give_back(JOB.id, message)
                    messages.append(message)
            elif outcome < 0.8:
                del held[message]
                records.give_back(JOB.id, message)
                messages.append(message)
        elif (
            messages and claim(records, message := messages.pop(rng.randrange(len(messages)))) is Claim.RENDER
        ):
            held[message] = True

    for number in range(300):
        move_caller(number) if rng.random() < 0.4 else move_worker()
        for submission, state in list(said.items())[-5:]:
            if state in (State.CANCELLED, State.DONE):
                assert records.get(JOB.id, submission).state is state
    # Nothing that is wanted is without a message.
    while messages or held:
        move_worker()
    assert records.get(JOB.id).state.is_final


# --- runs of prompt files ---------------------------------------------------------------------------------


def test_giving_up_a_submission_does_not_cancel_a_run_s_job_in_flight(
    records: Records, client: Redis
) -> None:
    mark = begin_run(client)
    submit(records, "a")
    claim(records, run=mark)
    assert records.cancel(JOB.id, "a") is State.CANCELLED
    assert records.progress({JOB.id: (1, 4)}, lease_s=30) == []
    assert done(records)
    assert ended_for_run(client) == "done"


def test_a_run_s_message_renders_what_others_gave_up_before(records: Records, client: Redis) -> None:
    mark = begin_run(client)
    submit(records, "a")
    records.cancel(JOB.id, "a")
    assert claim(records, "m2", run=mark) is Claim.RENDER
    assert records.get(JOB.id, "a").state is State.CANCELLED
    assert done(records)
    assert ended_for_run(client) == "done"


def test_a_run_s_message_renders_what_is_being_stopped_for_others(records: Records, client: Redis) -> None:
    mark = begin_run(client)
    submit(records, "a")
    claim(records, "m1")
    records.cancel(JOB.id, "a")
    assert claim(records, "m2", run=mark) is Claim.RENDER
    assert not records.failed(JOB.id, "m1", CANCELLED)
    assert done(records)
    assert ended_for_run(client) == "done"
    assert records.get(JOB.id, "a").state is State.CANCELLED


def test_a_job_that_was_cancelled_for_all_is_cancelled_for_a_run_that_had_sent_it(
    records: Records, client: Redis
) -> None:
    submit(records, "a")
    records.cancel(JOB.id)
    seconds, _ = client.time()
    client.hset(run_key(RUN), mapping={"fed": 1, "ttl": TTL_S})
    assert claim(records, "m2", run=f"{RUN}:0:0:1:{int(seconds) - 60}") is Claim.FINAL
    assert ended_for_run(client) == "failed"


def test_a_run_that_is_over_keeps_nobody_from_cancelling(records: Records, client: Redis) -> None:
    mark = begin_run(client)
    claim(records, run=mark)
    done(records)
    submit(records, "a")
    assert records.get(JOB.id).runs == (mark,)
    assert records.cancel(JOB.id, "a") is State.CANCELLED
    assert records.get(JOB.id).state is State.CANCELLED


# --- earlier versions, and others -------------------------------------------------------------------------


def test_whoever_submitted_by_an_earlier_version_keeps_the_job(records: Records, client: Redis) -> None:
    submit(records, "a")
    client.hdel(job_key(JOB.id), "sub:a", "subs")  # As an earlier version leaves it.
    submit(records, "b")
    assert records.cancel(JOB.id, "b") is State.CANCELLED
    assert records.get(JOB.id).state is State.QUEUED


def test_an_earlier_version_s_cancellation_is_of_the_whole_job(records: Records, client: Redis) -> None:
    submit(records, "a")
    submit(records, "b")
    client.hset(job_key(JOB.id), "state", "cancelled")
    submit(records, "c")
    assert {records.get(JOB.id, each).state for each in "ab"} == {State.CANCELLED}
    assert records.get(JOB.id, "c").state is State.QUEUED


def test_no_submission_outlives_its_time(records: Records, client: Redis) -> None:
    submit(records, "a")
    submit(records, "b")
    claim(records)
    records.cancel(JOB.id, "a")
    assert all(0 < client.ttl(key) <= TTL_S for key in client.keys("smallcat:*"))  # type: ignore[union-attr]


def test_a_full_redis_takes_no_submission_and_lets_them_be_given_up(records: Records, client: Redis) -> None:
    submit(records, "a")
    submit(records, "b")
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            submit(records, "c")
        assert records.cancel(JOB.id, "a") is State.CANCELLED
        assert records.get(JOB.id, "a").state is State.CANCELLED
    finally:
        client.config_set("maxmemory", 0)


# --- what producers can write -----------------------------------------------------------------------------

FORGED: dict[str, Callable[[Redis], Any]] = {
    "no attempts": lambda client: client.hset(job_key(JOB.id), mapping={"attempts": 0, "deaths": 0}),
    "fewer than none": lambda client: client.hset(job_key(JOB.id), "attempts", -1_000_000),
    "no number": lambda client: client.hset(job_key(JOB.id), mapping={"attempts": "nan", "deaths": "x"}),
    "no field": lambda client: client.hdel(job_key(JOB.id), "attempts", "deaths", "delivery"),
    "no record": lambda client: client.delete(job_key(JOB.id)),
    "a text": lambda client: (client.delete(job_key(JOB.id)), client.set(job_key(JOB.id), "x")),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_attempts_and_deaths_are_counted_where_producers_cannot_write(
    records: Records, client: Redis, forgery: str
) -> None:
    submit(records, "a")
    for attempt in range(3):
        assert claim(records) is Claim.RENDER
        FORGED[forgery](client)
        assert records.attempts_and_deaths(JOB.id) == (attempt + 1, attempt + 1)
    assert claim(records) is Claim.POISON


def test_attempts_that_a_record_alone_claims_leave_one(records: Records, client: Redis) -> None:
    """They may be those of an earlier worker, or forged."""
    submit(records, "a")
    client.hset(job_key(JOB.id), mapping={"attempts": 10**30, "deaths": "9" * 400})
    assert claim(records) is Claim.RENDER
    client.hset(job_key(JOB.id), mapping={"attempts": 2, "deaths": 2})
    assert records.attempts_and_deaths(JOB.id) == (3, 3)
    assert claim(records) is Claim.POISON


def test_a_job_that_ended_has_all_its_attempts_when_it_is_submitted_again(
    records: Records, client: Redis
) -> None:
    submit(records, "a")
    for _ in range(3):
        claim(records)
    assert records.failed(JOB.id, "m1", NotFiniteError("NaN"))
    assert client.hgetall(attempts_key(JOB.id)) == {"failed": "1"}
    submit(records, "b")
    assert claim(records) is Claim.RENDER
    assert records.get(JOB.id).attempts == 1


def test_a_job_that_is_cancelled_and_submitted_again_while_it_runs_is_no_poison(records: Records) -> None:
    for number in range(10):
        submit(records, f"s{number}")
        assert claim(records, f"m{number}") is Claim.RENDER
        records.cancel(JOB.id, f"s{number}")
        submit(records, f"t{number}")
        assert not records.failed(JOB.id, f"m{number}", CANCELLED)
        records.cancel(JOB.id, f"t{number}")


@pytest.mark.parametrize("kind", ["string", "list", "zset"])
def test_a_key_of_another_type_stands_in_nobody_s_way(records: Records, client: Redis, kind: str) -> None:
    other = job_of(2)
    records.claim(other, "m2", worker="w1", lease_s=0.0, max_attempts=3, queue="q")
    spoil = {
        "string": lambda key: client.set(key, "x"),
        "list": lambda key: client.lpush(key, "x"),
        "zset": lambda key: client.zadd(key, {"x": 1}),
    }[kind]
    spoil(job_key(JOB.id))
    # The heartbeat of the others goes on, and so do their claims.
    assert records.progress({JOB.id: (1, 4), other.id: (2, 4)}, lease_s=30) == []
    assert records.get(other.id).step == 2
    assert list(records.read([JOB.id, other.id])) == [other.id]
    assert claim(records) is Claim.RENDER
    for end in (
        lambda: records.give_back(JOB.id, "m1"),
        lambda: done(records),
        lambda: submit(records, "a"),
        lambda: records.attempts_and_deaths(JOB.id),
    ):
        client.delete(job_key(JOB.id))
        spoil(job_key(JOB.id))
        end()
    client.delete(job_key(JOB.id))
    spoil(job_key(JOB.id))
    with pytest.raises(UnknownJobError):
        records.cancel(JOB.id, "a")


def test_a_forged_record_is_an_unknown_job(records: Records, client: Redis) -> None:
    submit(records, "a")
    client.hset(job_key(JOB.id), mapping={"id": '"../../x"', "tries": "[]", "runs": "a b ../x"})
    assert (records.get(JOB.id).id, records.get(JOB.id).runs) == (JOB.id, ())
    for field, value in {
        "job": job_of(2).model_dump_json(),
        "state": "\x1b[31m",
        "step": "{",
        "timings": "[" * 9_999,
        "try:1": "{}",
    }.items():
        before = client.hget(job_key(JOB.id), field)
        client.hset(job_key(JOB.id), field, value)
        with pytest.raises(UnknownJobError, match="submit the job again"):
            records.get(JOB.id)
        assert records.read([JOB.id]) == {}
        client.hset(job_key(JOB.id), field, before) if before else client.hdel(job_key(JOB.id), field)
    assert records.get(JOB.id).state is State.QUEUED


@pytest.mark.parametrize("by", ["a", ""])
def test_submissions_of_a_queued_job_that_was_cancelled_stay_so_though_a_worker_calls_it_done(
    records: Records, client: Redis, by: str
) -> None:
    """As one of b89d500 and before does, whose render of an earlier submission was just being stopped."""
    submit(records, "a")
    if not by:
        submit(records, "b")
    assert records.cancel(JOB.id, by) is State.CANCELLED
    client.hset(job_key(JOB.id), "state", "done")
    for submission in ("a", *(() if by else ("b",))):
        assert records.get(JOB.id, submission).state is State.CANCELLED
        assert records.cancel(JOB.id, submission) is State.CANCELLED
    assert records.get(JOB.id).state is State.DONE
    submit(records, "c")
    assert records.get(JOB.id, "a").state is State.CANCELLED
    assert records.get(JOB.id, "c").state is State.QUEUED


def test_a_submission_that_is_sent_again_after_its_job_is_done_stays_done(records: Records) -> None:
    """As where no replica confirmed it in time; another submission starts the job anew."""
    records.submitted(JOB, "q", "a", "m1")
    assert claim(records, "m1") is Claim.RENDER
    records.done(JobRecord(id=JOB.id, state=State.DONE, job=JOB, uri="s3://b/x.png"))
    records.submitted(JOB, "q", "a", "m2")
    assert records.get(JOB.id, "a").state is State.DONE
    records.submitted(JOB, "q", "b", "m3")
    assert records.get(JOB.id, "b").state is State.QUEUED


def test_a_submission_whose_answer_was_lost_puts_its_message_once(records: Records, client: Redis) -> None:
    """The client sends the same command again; a try of its own has another message."""
    for message in ("m1", "m1", "m2"):
        records.submitted(JOB, "q", "a", message, "1", ("q", message))
    assert client.lrange("q", 0, -1) == ["m2", "m1"]
    assert claim(records, "m1") is Claim.RENDER
    done(records)
    records.submitted(JOB, "q", "a", "m1", "1", ("q", "m1"))
    assert client.llen("q") == 2


def test_a_full_redis_takes_neither_record_nor_message(records: Records, client: Redis) -> None:
    records.submitted(OTHERS, "q", "a", "m1", "1", ("q", "m1"))
    client.delete(job_key(JOB.id), "q")
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            records.submitted(JOB, "q", "a", "m2", "1", ("q", "m2"))
    finally:
        client.config_set("maxmemory", 0)
    assert not client.exists(job_key(JOB.id), "q")


def test_a_list_that_cannot_take_the_message_leaves_no_record(records: Records, client: Redis) -> None:
    client.set("q", "no list")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        records.submitted(JOB, "q", "a", "m1", "1", ("q", "m1"))
    assert not client.exists(job_key(JOB.id))
