"""A message that is set aside: its job fails, and no forged message fails anybody's job.

Against a real server: what is promised here is promised by its scripts. With processes that die, and as a
producer with the rights of one: tests/faults/test_security.py, tests/integration/test_acl.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from producer.ingest.run_state import Run
from producer.ingest.sent import Sent
from tests.worker.broker import test_malformed as stored
from tests.worker.engine.fake_runner import job_of
from worker.contract.errors import RenderError
from worker.contract.found_message import fingerprint
from worker.contract.message import RETURNS, RunMark, payload_of
from worker.contract.record import Attempt, JobRecord, State
from worker.state.failures import Failures
from worker.state.keys import attempts_key, job_key, run_key
from worker.state.records import Claim, Records
from worker.state.redis_client import connect
from worker.state.shared_scripts import load
from worker.state.submissions import Submission, Submissions

JOB = job_of(1)
QUEUE = "smallcat.fake@ffff"
WHY = "it is odd"


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def records(client: Redis) -> Records:
    return Records(client, 1_000)


def sent(number: int = 0, run: str = "", **headers: Any) -> bytes:
    """A message of the job, as it stands in a list."""
    message = stored.headers(id=f"{JOB.id}-{number:08x}", **headers)
    message["body"] = stored.body([payload_of(JOB, run)], {}, {})
    message["properties"]["delivery_tag"] = f"tag-{number}"
    return json.dumps(message).encode()


def submit(records: Records, number: int = 0) -> bytes:
    """Submit the job, and the message that was sent."""
    raw = sent(number)
    records.submitted(JOB, QUEUE, f"s{number}", f"{JOB.id}-{number:08x}", fingerprint(raw))
    return raw


def claim(records: Records, number: int = 0, tag: str = "", **options: Any) -> Claim:
    message = f"{JOB.id}-{number:08x}/{tag or f'tag-{number}'}"
    given = {"worker": "w1", "lease_s": 30.0, "max_attempts": 3, "queue": QUEUE} | options
    return records.claim(JOB, message, **given)[0]


def state(records: Records) -> tuple[State, str | None]:
    record = records.get(JOB.id)
    return record.state, record.error_type


def finish(records: Records) -> None:
    assert records.done(JobRecord(id=JOB.id, state=State.DONE, job=JOB, uri="s3://bucket/x"))


FORGED: dict[str, Callable[[bytes], bytes]] = {
    "another header": lambda raw: raw.replace(b'"lang"', b'"long"'),
    "another body": lambda raw: json.dumps(json.loads(raw) | {"body": "e30="}).encode(),
    "another tag": lambda raw: raw.replace(b"tag-0", b"tag-x"),
    "a chain": lambda raw: json.dumps(
        json.loads(raw) | {"headers": json.loads(raw)["headers"] | {"chain": "x"}}
    ).encode(),
}


def test_a_job_whose_only_message_is_set_aside_has_failed_with_the_reason(
    records: Records, client: Redis
) -> None:
    assert records.set_aside(submit(records), WHY)
    record = records.get(JOB.id)
    assert (record.state, record.error_type) == (State.FAILED, "InvalidJobError")
    assert WHY in str(record.error)
    assert [each.id for each in Failures(client).list()] == [JOB.id]
    # It can be submitted again.
    submit(records, 1)
    assert state(records) == (State.QUEUED, None)
    assert claim(records, 1) is Claim.RENDER


def test_what_workers_add_to_a_message_that_comes_back_makes_it_no_other(records: Records) -> None:
    message = json.loads(submit(records))
    message["headers"] |= {"redelivered": True, RETURNS: 7}
    message["properties"]["delivery_info"]["redelivered"] = True
    message["properties"]["delivery_tag"] += "#1764331234.123456"
    assert records.set_aside(json.dumps(message).encode(), WHY)


@pytest.mark.parametrize("forgery", FORGED)
@pytest.mark.parametrize("when", ["first", "between fetch and claim", "claimed", "given back", "done"])
def test_a_forged_copy_of_a_message_fails_nobody(records: Records, forgery: str, when: str) -> None:
    """`first` and `between fetch and claim` are one to Redis: the honest message has no claim yet."""
    raw = submit(records)
    forged = FORGED[forgery](raw)
    if when in ("claimed", "given back", "done"):
        assert claim(records) is Claim.RENDER
    if when == "given back":
        records.give_back(JOB.id, f"{JOB.id}-00000000/tag-0")
    if when == "done":
        finish(records)
    before = state(records)
    assert not records.set_aside(forged, WHY)
    assert state(records) == before
    if when != "done":
        assert claim(records) is Claim.RENDER
        finish(records)
    assert state(records) == (State.DONE, None)


def test_a_job_of_several_submissions_fails_with_the_last_of_their_messages(records: Records) -> None:
    raws = [submit(records, number) for number in range(3)]
    for raw in (raws[0], raws[0], raws[2]):
        assert not records.set_aside(raw, WHY)
        assert state(records) == (State.QUEUED, None)
    assert records.set_aside(raws[1], WHY)
    assert state(records) == (State.FAILED, "InvalidJobError")


def test_submissions_that_are_sent_together_note_their_fingerprints_too(
    records: Records, client: Redis
) -> None:
    raw, job = sent().decode(), JOB.model_dump_json()
    submission = Submission(JOB.id, job, QUEUE, "s0", "{}", f"{JOB.id}-00000000", QUEUE, raw)
    load(client)
    assert Submissions(client, 1_000).send([submission])[0] == [None]
    assert not records.set_aside(FORGED["a chain"](raw.encode()), WHY)
    assert records.set_aside(client.lpop(QUEUE).encode(), WHY)


def test_a_job_that_another_message_has_goes_on(records: Records) -> None:
    raws = [submit(records, number) for number in range(2)]
    assert claim(records, 1) is Claim.RENDER
    for raw in raws:
        assert not records.set_aside(raw, WHY) or raw == raws[1]
    records.give_back(JOB.id, f"{JOB.id}-00000001/tag-1")


def test_a_submission_that_was_sent_twice_has_the_latter_message(records: Records) -> None:
    """As when the first try to send it failed: it may never have arrived."""
    first = submit(records)
    again = sent(1)
    records.submitted(JOB, QUEUE, "s0", f"{JOB.id}-00000001", fingerprint(again))
    assert not records.set_aside(first, WHY)
    assert records.set_aside(again, WHY)


def test_a_message_that_kills_workers_before_they_have_the_job_is_poison(records: Records) -> None:
    """Also where one of them had it before, and died."""
    raw = submit(records)
    claim(records)
    assert records.set_aside(raw, "it was fetched 14 times", is_poison=True)
    assert state(records) == (State.FAILED, "PoisonJobError")
    assert "fetched 14 times" in str(records.get(JOB.id).error)


# --- earlier versions -------------------------------------------------------------------------------------


EARLIER: dict[str, Callable[[Redis], object]] = {
    "without fingerprints": lambda client: client.hset(job_key(JOB.id), "sub:s0", 1),
    "without messages": lambda client: (
        client.hset(job_key(JOB.id), "sub:s0", 1),
        client.hdel(job_key(JOB.id), "message"),
    ),
    "without submissions": lambda client: client.hdel(job_key(JOB.id), "message", "sub:s0", "subs"),
}


@pytest.mark.parametrize("kind", EARLIER)
def test_no_earlier_record_says_queued_when_its_message_is_gone(
    records: Records, client: Redis, kind: str
) -> None:
    raw = submit(records)
    EARLIER[kind](client)
    assert records.set_aside(raw, WHY)
    assert state(records) == (State.FAILED, "InvalidJobError")


@pytest.mark.parametrize("kind", EARLIER)
def test_a_message_that_can_be_read_renders_what_a_forged_one_has_failed(
    records: Records, client: Redis, kind: str
) -> None:
    """For records of earlier versions, which name no fingerprint, that is all that can be done."""
    forged = FORGED["a chain"](submit(records))
    EARLIER[kind](client)
    assert records.set_aside(forged, WHY)
    assert claim(records) is Claim.RENDER
    assert state(records) == (State.RUNNING, None)
    finish(records)
    assert state(records) == (State.DONE, None)
    assert Failures(client).list() == []


def test_two_submissions_of_an_earlier_version_fail_with_their_second_message(records: Records) -> None:
    for number in range(2):
        records.submitted(JOB, QUEUE, f"s{number}", f"{JOB.id}-{number:08x}")
    assert not records.set_aside(sent(0), WHY)
    assert records.set_aside(sent(1), WHY)
    assert state(records) == (State.FAILED, "InvalidJobError")


def test_a_message_without_an_id_of_ours_fails_nobody(records: Records) -> None:
    submit(records)
    for raw in (b"", b"\xff", b"[]", b"{}", b'{"headers": {"id": 5}}', b"[" * 10_000, sent(0)[:-20]):
        assert not records.set_aside(raw, WHY)
    assert state(records) == (State.QUEUED, None)


# --- runs of prompt files ---------------------------------------------------------------------------------


def feed(client: Redis, windows: list[int]) -> list[bytes]:
    """Messages of a run's jobs, sent in windows of so many."""
    run = Run(client, "r1", "digest", 1_000)
    run.take()
    messages: list[bytes] = []
    for size in windows:
        start = len(messages)
        texts = [sent(start + number, mark(start + number)) for number in range(size)]
        run.feed(start, [Sent(QUEUE, text.decode()) for text in texts], "", None, 0)
        messages += texts
    run.release()
    return messages


def mark(number: int) -> str:
    return RunMark("r1", number, 0, number + 1, 1_764_331_234).encode()


def failed_of_run(client: Redis) -> list[int]:
    return [number for number in range(2_000) if client.getbit(f"{run_key('r1')}:failed", number)]


def test_a_run_hears_of_each_message_that_is_set_aside(records: Records, client: Redis) -> None:
    """Of those at the edges of windows, and of the blocks in which their fingerprints are kept."""
    messages = feed(client, [3, 500, 1, 600, 20])
    numbers = [0, 2, 3, 502, 503, 511, 512, 1_023, 1_024, 1_103, 1_104, 1_123]
    for number in numbers:
        client.delete(job_key(JOB.id))
        assert records.set_aside(messages[number], WHY)
    assert failed_of_run(client) == numbers
    told = [json.loads(text) for text in client.lrange(f"{run_key('r1')}:news", 0, -1)]
    assert [each[0] for each in told] == numbers
    assert told[0][2:5] == [1, JOB.id, "failed"]
    assert told[0][7] == "InvalidJobError"
    assert WHY in told[0][8]
    assert client.hget(run_key("r1"), "ended") == str(len(numbers))


def test_a_job_that_only_a_run_has_sent_can_be_listed_and_submitted_again(
    records: Records, client: Redis
) -> None:
    """Where the message can be read: it killed its workers."""
    [raw] = feed(client, [1])
    assert records.set_aside(raw, "it was fetched 14 times", is_poison=True)
    assert state(records) == (State.FAILED, "PoisonJobError")
    assert records.get(JOB.id).job == JOB
    assert records.get(JOB.id).runs == (mark(0),)
    [failure] = Failures(client).list()
    assert (failure.id, failure.error_type) == (JOB.id, "PoisonJobError")
    assert 0 < client.ttl(job_key(JOB.id)) <= 1_000


@pytest.mark.parametrize("forgery", ["another header", "another body", "a chain"])
@pytest.mark.parametrize("when", ["first", "claimed", "given back"])
def test_a_forged_message_of_a_run_fails_none_of_its_jobs(
    records: Records, client: Redis, forgery: str, when: str
) -> None:
    messages = feed(client, [2])
    forged = FORGED[forgery](messages[1])
    if when != "first":
        assert claim(records, 1, run=mark(1)) is Claim.RENDER
    if when == "given back":
        records.give_back(JOB.id, f"{JOB.id}-00000001/tag-1")
    # Nor is it the message of another of its jobs.
    for raw in (forged, sent(0, mark(1)), sent(1, mark(0)), sent(5, mark(5))):
        assert not records.set_aside(raw, WHY)
    assert failed_of_run(client) == []
    assert claim(records, 1, run=mark(1)) is Claim.RENDER
    finish(records)
    assert client.getbit(f"{run_key('r1')}:done", 1) == 1


def test_a_job_that_a_run_has_sent_again_fails_with_either_message(records: Records, client: Redis) -> None:
    feed(client, [2])
    run = Run(client, "r1", "digest", 1_000)
    run.take(timeout_s=0)
    again = sent(9, mark(1))
    run.send_again({1: Sent(QUEUE, again.decode())})
    assert records.set_aside(again, WHY)
    assert failed_of_run(client) == [1]


def test_a_run_and_a_submission_of_one_job_hear_of_their_own_messages(
    records: Records, client: Redis
) -> None:
    [of_run] = feed(client, [1])
    own = submit(records, 7)
    assert records.set_aside(of_run, WHY)
    assert failed_of_run(client) == [0]
    assert state(records) == (State.QUEUED, None)
    assert records.set_aside(own, WHY)
    assert state(records) == (State.FAILED, "InvalidJobError")


def test_a_run_of_an_earlier_feeder_hears_of_it_until_the_job_is_done(
    records: Records, client: Redis
) -> None:
    [raw] = feed(client, [1])
    client.delete(f"{run_key('r1')}:prints")
    assert records.set_aside(FORGED["a chain"](raw), WHY)
    assert failed_of_run(client) == [0]
    assert claim(records, run=mark(0)) is Claim.RENDER
    finish(records)
    assert failed_of_run(client) == []
    assert client.getbit(f"{run_key('r1')}:done", 0) == 1
    assert client.hget(run_key("r1"), "ended") == "1"


def test_a_run_that_is_unknown_or_of_another_type_hears_nothing(records: Records, client: Redis) -> None:
    raw = sent(0, mark(0))
    assert not records.set_aside(raw, WHY)
    client.set(f"{run_key('r1')}:prints", "x")
    assert not records.set_aside(raw, WHY)
    assert not client.exists(job_key(JOB.id))


# --- copies, and what producers write into records --------------------------------------------------------


def test_copies_of_a_message_in_flight_are_no_attempts(records: Records, client: Redis) -> None:
    """Whoever reads a queue can push its messages a second time."""
    submit(records)
    assert claim(records) is Claim.RENDER
    for number in range(10):
        assert claim(records, tag=f"tag-0#{number}") is Claim.TAKEN
    assert records.attempts_and_deaths(JOB.id) == (1, 1)
    # They give nothing back, and end nothing.
    records.give_back(JOB.id, f"{JOB.id}-00000000/tag-0#1")
    assert state(records) == (State.RUNNING, None)
    assert claim(records) is Claim.RENDER  # The message itself, after the death of its worker.


FORGERIES: dict[str, dict[str, Any]] = {
    "a claim": {"claim": "x", "claim_until": "9e9"},
    "a claim of its own message": {"claim": f"{JOB.id}-00000000", "claim_until": "9e9"},
    "failed": {"state": "failed", "error": "x", "error_type": "RenderError"},
    "done": {"state": "done", "uri": "s3://elsewhere/x", "cached": "true"},
    "attempts": {"attempts": "99", "deaths": "99", "try:99": "{}"},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_record_keeps_no_job_from_being_rendered(records: Records, client: Redis, name: str) -> None:
    submit(records)
    client.hset(job_key(JOB.id), mapping=FORGERIES[name])
    assert claim(records, is_stored=lambda: False) is Claim.RENDER
    client.hset(job_key(JOB.id), mapping=FORGERIES[name])
    # Nor from being rendered after its worker died. Attempts that it alone says leave one, as those of an
    # earlier worker do.
    if name != "attempts":
        assert claim(records, is_stored=lambda: False) is Claim.RENDER


@pytest.mark.parametrize("fields", [("claim",), ("claim", "claim_until", "attempts", "deaths", "delivery")])
def test_a_record_whose_claim_is_deleted_still_hears_of_its_end(
    records: Records, client: Redis, fields: tuple[str, ...]
) -> None:
    submit(records)
    message = f"{JOB.id}-00000000/tag-0"
    for _ in range(2):
        assert claim(records) is Claim.RENDER
        client.hdel(job_key(JOB.id), *fields)
        failure = Attempt(attempt=1, worker="w1", at=1.0, error_type="RenderError", error="x")
        records.give_back(JOB.id, message, failure)
        assert state(records)[0] is State.QUEUED
    assert claim(records) is Claim.RENDER
    client.hdel(job_key(JOB.id), *fields)
    assert records.failed(JOB.id, message, RenderError("x"))
    assert state(records) == (State.FAILED, "RenderError")


def test_a_job_that_is_done_is_not_rendered_again_while_its_picture_is_there(records: Records) -> None:
    submit(records)
    claim(records)
    finish(records)
    assert claim(records, 1, is_stored=lambda: True) is Claim.FINAL
    assert claim(records, 1, is_stored=lambda: False) is Claim.RENDER
    assert state(records) == (State.RUNNING, None)


def test_a_job_that_has_failed_stays_failed_for_other_messages(records: Records) -> None:
    submit(records)
    claim(records)
    assert records.failed(JOB.id, f"{JOB.id}-00000000/tag-0", RenderError("x"))
    assert claim(records, 1) is Claim.FINAL


def test_a_job_that_an_earlier_worker_has_is_taken(records: Records, client: Redis) -> None:
    """It claims in the record alone, and counts its attempt where producers cannot write."""
    submit(records)
    seconds, _ = client.time()
    earlier = {"state": "running", "claim": "m0", "claim_until": int(seconds) + 30}
    client.hset(job_key(JOB.id), mapping=earlier)
    assert claim(records) is Claim.RENDER
    client.delete(attempts_key(JOB.id))
    client.hset(job_key(JOB.id), mapping=earlier)
    client.hset(attempts_key(JOB.id), mapping={"attempts": 1, "deaths": 1, "open:m0": "d"})
    assert claim(records) is Claim.TAKEN
    client.hset(job_key(JOB.id), "claim_until", int(seconds) - 1)
    assert claim(records) is Claim.RENDER
