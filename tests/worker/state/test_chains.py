"""Jobs that wait for the pictures of other jobs: what becomes of them, whatever becomes of those.

Against a real server: what is promised here is promised by its scripts.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.worker.broker import test_malformed as stored
from tests.worker.engine.fake_runner import job_of
from tests.worker.state.test_records import TTL_S, claim, client, done, records
from worker.contract.errors import InvalidJobError, JobCancelledError, RenderError
from worker.contract.found_message import fingerprint
from worker.contract.job import Job
from worker.contract.message import payload_of
from worker.contract.record import State
from worker.contract.webhook import hook_of
from worker.state import chains as chains_module
from worker.state import scripts
from worker.state.chains import MAX_CHILDREN, MAX_DEPTH, Chains
from worker.state.failures import Failures
from worker.state.forgetting import Forgetting, Scope
from worker.state.keys import TOLD_BY_PRODUCERS, WAITING, WEBHOOKS, attempts_key, job_key, run_key
from worker.state.records import Claim, Records
from worker.state.redis_client import connect
from worker.state.shared_scripts import load
from worker.state.submissions import Submission, Submissions

__all__ = ["client", "records"]

ROOT = Path(__file__).parents[3]
QUEUE, LIST = "smallcat.fake@ffff", "smallcat.fake@ffff"
REMEDY = "Submit that job again, then this one."
_numbers = itertools.count()


def child_of(*parents: Job, seed: int = 50, **fields: Any) -> Job:
    """A job that begins with the picture of one job, or of two: image and mask."""
    named = {name: f"job:{parent.id}:64x64" for name, parent in zip(("image", "mask"), parents, strict=False)}
    size = {"width": 64, "height": 64}
    return Job.parse(job_of(seed).model_dump() | {"metadata": {}} | size | named | fields)


def submit(records: Records, job: Job, submission: str = "a", **more: Any) -> bool:
    """Submit as `submit_job` does; returns whether it waits."""
    message = f"{job.id}-{next(_numbers)}"
    return records.submitted(job, QUEUE, submission, message, "print", (LIST, f"message of {job.id}"), **more)


def waiting(client: Redis) -> list[str]:
    """The ids of the jobs whose messages are in the queue, next one first."""
    found: Any = client.lrange(LIST, 0, -1)
    return [text.removeprefix("message of ") for text in reversed(found)]


def finish(records: Records, job: Job, message: str = "m") -> None:
    assert claim(records, message, job)[0] is Claim.RENDER
    assert records.done(done(job))


def chains_of(client: Redis) -> Chains:
    return Chains(client)


def nothing_is_left(client: Redis) -> None:
    """No job is noted as waiting, and every key expires."""
    assert not client.exists(WAITING)
    keys: list[str] = [str(each) for each in client.scan_iter("smallcat:*")]
    assert [each for each in keys if each.endswith(":children")] == []
    assert [each for each in keys if client.ttl(each) == -1] == []


def test_a_job_waits_outside_the_queue_until_its_parent_is_done(records: Records, client: Redis) -> None:
    parent, child = job_of(1), child_of(job_of(1))
    assert not submit(records, parent)
    assert submit(records, child)
    record = records.get(child.id)
    assert (record.state, record.waits_for) == (State.WAITING, (parent.id,))
    assert not record.state.is_final
    assert waiting(client) == [parent.id]
    finish(records, parent)
    assert waiting(client) == [parent.id, child.id]
    record = records.get(child.id)
    assert (record.state, record.waits_for) == (State.QUEUED, ())
    finish(records, child)
    assert records.get(child.id).state is State.DONE
    nothing_is_left(client)


def test_a_job_whose_parent_is_done_or_was_long_ago_is_queued_at_once(
    records: Records, client: Redis
) -> None:
    parent = job_of(1)
    assert not submit(records, child_of(parent))  # No record: the door has looked into the bucket.
    submit(records, parent)
    finish(records, parent)
    assert not submit(records, child_of(parent, seed=51))
    assert len(waiting(client)) == 3


def test_a_child_has_one_id_whatever_its_parent_is(records: Records) -> None:
    parent = job_of(1)
    before = child_of(parent).id
    submit(records, parent)
    finish(records, parent)
    assert child_of(parent).id == before


def test_each_submission_of_a_waiting_job_has_its_message_released(records: Records, client: Redis) -> None:
    parent, child = job_of(1), child_of(job_of(1))
    submit(records, parent)
    assert submit(records, child, "a")
    assert submit(records, child, "b")
    # Sent again because an answer was lost: one message a submission.
    assert submit(records, child, "b")
    finish(records, parent)
    assert waiting(client) == [parent.id, child.id, child.id]


def test_a_job_waits_for_both_its_image_and_its_mask(records: Records, client: Redis) -> None:
    image, mask = job_of(1), job_of(2)
    child = child_of(image, mask)
    for each in (image, mask):
        submit(records, each)
    submit(records, child)
    finish(records, image)
    assert records.get(child.id).waits_for == (mask.id,)
    assert waiting(client) == [image.id, mask.id]
    finish(records, mask)
    assert waiting(client)[-1] == child.id
    nothing_is_left(client)


def chain(records: Records, length: int) -> list[Job]:
    """A job, and jobs behind it that each wait for the one before."""
    jobs = [job_of(1)]
    for number in range(length):
        jobs.append(child_of(jobs[-1], seed=100 + number))
    for job in jobs:
        submit(records, job)
    return jobs


def test_children_of_children_are_released_one_after_the_other(records: Records, client: Redis) -> None:
    jobs = chain(records, 3)
    for number, job in enumerate(jobs):
        assert waiting(client) == [each.id for each in jobs[: number + 1]]
        finish(records, job)
    nothing_is_left(client)


def fail(records: Records, client: Redis, job: Job) -> None:
    claim(records, "m", job)
    assert records.failed(job.id, "m", RenderError("It broke."))


def cancel_queued(records: Records, client: Redis, job: Job) -> None:
    assert records.cancel(job.id) is State.CANCELLED


def cancel_running(records: Records, client: Redis, job: Job) -> None:
    claim(records, "m", job)
    records.cancel(job.id)
    assert records.cancelled(job.id, "m", JobCancelledError("The job was cancelled."))


def cancel_between(records: Records, client: Redis, job: Job) -> None:
    """It was running, was given back, and is fetched again."""
    claim(records, "m", job)
    records.cancel(job.id)
    records.give_back(job.id, "m")
    assert claim(records, "m", job)[0] is Claim.FINAL


def forget(records: Records, client: Redis, job: Job) -> None:
    Forgetting(client, 100, Scope(job=job.id), lambda *_: None, is_dry=False).forget({job.id: ""})


def set_aside(records: Records, client: Redis, job: Job) -> None:
    message = stored.headers(id=f"{job.id}-00000000")
    message["body"] = stored.body([payload_of(job)], {}, {})
    message["properties"]["delivery_tag"] = "tag"
    raw = json.dumps(message).encode()
    client.hset(job_key(job.id), "sub:a", fingerprint(raw))
    assert records.set_aside(raw, "it came back too often", is_poison=True)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (fail, "failed: It broke."),
        (cancel_queued, "was cancelled."),
        (cancel_running, "was cancelled."),
        (cancel_between, "was cancelled."),
        (forget, "was forgotten."),
        (set_aside, "failed: The job's message is set aside: it came back too often. See the workers' logs."),
    ],
)
def test_whatever_ends_a_job_fails_all_that_wait_for_it_and_says_why(
    records: Records, client: Redis, end: Callable[..., None], why: str
) -> None:
    jobs = chain(records, 3)
    sibling = child_of(jobs[0], seed=200)
    submit(records, sibling)
    end(records, client, jobs[0])
    found = [records.get(each.id) for each in (jobs[1], sibling)]
    assert {(each.state, each.error_type) for each in found} == {(State.FAILED, "InputError")}
    first = f"The job begins with the picture of job {jobs[0].id}, which {why} {REMEDY}"
    assert {each.error for each in found} == {first}
    for number in (2, 3):
        record = records.get(jobs[number].id)
        because = f"failed, because job {jobs[0].id} {why}"
        before = jobs[number - 1].id
        assert record.error == f"The job begins with the picture of job {before}, which {because} {REMEDY}"
    assert {each.id for each in (*jobs[1:], sibling)} <= {each.id for each in Failures(client).list()}
    assert waiting(client) == [jobs[0].id]
    nothing_is_left(client)
    # All of it can be submitted again.
    assert [submit(records, job) for job in jobs] == [False, True, True, True]


def test_a_parent_that_goes_on_keeps_its_children(records: Records, client: Redis) -> None:
    """Retried, given back, rendered twice, and submitted again while it was to be cancelled."""
    parent, child = job_of(1), child_of(job_of(1))
    submit(records, parent)
    submit(records, child)
    claim(records, "m1", parent)
    records.give_back(parent.id, "m1")
    claim(records, "m1", parent)
    records.cancel(parent.id)
    submit(records, parent, "b")
    assert records.get(child.id).state is State.WAITING
    assert records.done(done(parent))
    assert not records.done(done(parent))
    assert waiting(client).count(child.id) == 1
    nothing_is_left(client)


def test_a_waiting_job_can_be_given_up_and_submitted_again(records: Records, client: Redis) -> None:
    parent, child, grandchild, *_ = chain(records, 2)
    assert records.cancel(child.id, "a") is State.CANCELLED
    assert records.get(child.id).waits_for == ()
    assert (records.get(grandchild.id).error or "").endswith(f"was cancelled. {REMEDY}")
    finish(records, parent)
    assert waiting(client) == [parent.id]
    assert records.get(child.id).state is State.CANCELLED
    nothing_is_left(client)
    assert not submit(records, child)


def test_one_of_several_submissions_gives_a_waiting_job_up_alone(records: Records) -> None:
    submit(records, job_of(1))
    child = child_of(job_of(1))
    for submission in ("a", "b"):
        submit(records, child, submission)
    assert records.cancel(child.id, "a") is State.CANCELLED
    assert records.get(child.id, "b").state is State.WAITING


def test_a_forgotten_child_is_not_released(records: Records, client: Redis) -> None:
    parent, child = job_of(1), child_of(job_of(1))
    for job in (parent, child):
        submit(records, job)
    forget(records, client, child)
    finish(records, parent)
    assert waiting(client) == [parent.id]
    nothing_is_left(client)


@pytest.mark.parametrize("end", [fail, cancel_queued, forget])
def test_a_job_whose_parent_has_failed_is_refused(
    records: Records, client: Redis, end: Callable[..., None]
) -> None:
    parent, child = job_of(1), child_of(job_of(1))
    submit(records, parent)
    end(records, client, parent)
    with pytest.raises(InvalidJobError, match=f"job {parent.id}, which .* submit that job again first"):
        submit(records, child)
    assert not client.exists(job_key(child.id))


def test_a_chain_that_is_too_long_is_refused(records: Records, client: Redis) -> None:
    jobs = chain(records, MAX_DEPTH)
    late = child_of(jobs[-1], seed=300)
    with pytest.raises(InvalidJobError, match="waits itself, as number 16 of a chain, the limit"):
        submit(records, late)
    assert not client.exists(job_key(late.id))
    finish(records, jobs[0])
    finish(records, jobs[1])
    assert submit(records, late)


def test_more_children_than_the_limit_are_refused(records: Records, client: Redis) -> None:
    parent = job_of(1)
    submit(records, parent)
    client.hset(f"{job_key(parent.id)}:children", mapping={f"{n:032x}": "" for n in range(MAX_CHILDREN)})
    with pytest.raises(InvalidJobError, match="which 1,000 jobs wait for already, the limit"):
        submit(records, child_of(parent))


def test_limits_are_the_same_in_the_script() -> None:
    assert f"= {MAX_CHILDREN}, {MAX_DEPTH}, " in scripts.SUBMIT


def test_refusals_come_back_for_each_of_many_submissions(records: Records, client: Redis) -> None:
    parent = job_of(1)
    submit(records, parent)
    fail(records, client, parent)
    child, other = child_of(parent), job_of(2)
    sent = [
        Submission(
            *(job.id, job.model_dump_json(), QUEUE, "a", "{}", "m", LIST, f"message of {job.id}"),
            parents=parents,
        )
        for job, parents in ((child, (parent.id,)), (other, ()))
    ]
    refused, _ = Submissions(client, 100).send(sent)
    assert isinstance(refused[0], InvalidJobError)
    assert refused[1] is None
    assert waiting(client) == [parent.id, other.id]


def test_webhooks_of_children_are_told_why_by_whoever_ends_the_parent(
    records: Records, client: Redis
) -> None:
    hook = hook_of("https://a.example.com/hook", "")
    for end, told_by in ((cancel_queued, TOLD_BY_PRODUCERS), (fail, f"{WEBHOOKS}:new")):
        parent, child = job_of(1), child_of(job_of(1))
        submit(records, parent)
        submit(records, child, hook=hook)
        end(records, client, parent)
        [entry] = client.lrange(told_by, 0, -1)  # type: ignore[misc]
        told = json.loads(str(entry).partition(" ")[2])
        assert (told["job"], told["state"], told["error_type"]) == (child.id, "failed", "InputError")
        assert told["error"] == records.get(child.id).error


# --- what scripts of this version did not end ---------------------------------------------------------------


def look(client: Redis, stored: bool | None = None) -> None:
    """A worker's look; `stored`: what the bucket says, which must not be asked where that is None."""

    def is_stored(job_id: str, tenant: str) -> bool:
        assert stored is not None
        return stored

    Chains(client).look(is_stored)


def test_a_look_keeps_what_waits_longer_than_records_live(records: Records, client: Redis) -> None:
    parent, child = chain(records, 1)
    keys = [job_key(parent.id), job_key(child.id), f"{job_key(parent.id)}:children", WAITING]
    for key in keys:
        client.expire(key, 10)
    look(client)
    assert [client.ttl(key) for key in keys] == [TTL_S] * 4
    finish(records, parent)
    assert waiting(client) == [parent.id, child.id]


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_a_look_settles_what_an_earlier_version_has_ended(
    records: Records, client: Redis, state: str
) -> None:
    parent, child, grandchild = chain(records, 2)
    look(client)
    assert records.get(child.id).state is State.WAITING
    client.hset(job_key(parent.id), mapping={"state": state, "error": "It broke."})
    look(client)
    assert records.get(child.id).state is (State.QUEUED if state == "done" else State.FAILED)
    assert records.get(grandchild.id).state is (State.WAITING if state == "done" else State.FAILED)


@pytest.mark.parametrize(("stored", "state"), [(True, State.QUEUED), (False, State.FAILED)])
def test_a_look_asks_the_bucket_for_a_parent_without_a_record(
    records: Records, client: Redis, stored: bool, state: State
) -> None:
    parent, child = chain(records, 1)
    client.delete(job_key(parent.id))
    look(client, stored)
    record = records.get(child.id)
    assert record.state is state
    assert (record.error or "is not known any more").count("is not known any more") == 1


def test_a_look_does_what_was_too_much_for_one_call(
    records: Records, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = scripts.CANCEL.replace(f"= {MAX_CHILDREN}, {MAX_DEPTH}, 1000", f"= {MAX_CHILDREN}, {MAX_DEPTH}, 2")
    assert few != scripts.CANCEL
    parent, *_ = jobs = chain(records, 4)
    cancel = client.register_script(few)
    cancel(keys=[job_key(parent.id), "none"], args=[parent.id, "channel", ""])
    assert [records.get(job.id).state for job in jobs[1:]].count(State.FAILED) == 2
    monkeypatch.setattr(chains_module, "LOOKED_AT", 1)
    for _ in range(4):
        look(client)
    assert {records.get(job.id).state for job in jobs[1:]} == {State.FAILED}
    assert not client.exists(WAITING)


def test_runs_are_told_of_children_that_fail_by_workers_alone(records: Records, client: Redis) -> None:
    """A producer may not write what runs have done."""
    parent, child = chain(records, 1)
    mark = "r:0:0:0:1"
    client.hset(run_key("r"), mapping={"fed": 1, "ttl": 100})
    client.hset(job_key(child.id), "runs", mark)
    records.cancel(parent.id)
    assert records.get(child.id).state is State.WAITING
    look(client)
    assert records.get(child.id).state is State.FAILED
    news: Any = client.lrange(f"{run_key('r')}:news", 0, -1)
    [news] = map(json.loads, news)
    assert news[3:5] == [child.id, "failed"]


def test_a_producer_leaves_it_to_workers_to_list_what_has_failed(
    records: Records, client: Redis, valkey: ValkeyProcess
) -> None:
    """`deploy/redis-producer.acl`: else it could list what it likes."""
    rules = (ROOT / "deploy/redis-producer.acl").read_text().replace(">PASSWORD", ">p")
    _, *words = re.findall(r"\([^)]*\)|\S+", rules)
    client.execute_command("ACL", "SETUSER", *words)  # type: ignore[no-untyped-call]
    parent, child, grandchild = chain(records, 2)
    load(client)
    try:
        with connect(f"redis://producer:p@127.0.0.1:{valkey.port}/0", retry_s=1) as producer:
            Records(producer, 1_000).cancel(parent.id)
    finally:
        client.execute_command("ACL", "DELUSER", "producer")  # type: ignore[no-untyped-call]
    assert {records.get(each.id).state for each in (child, grandchild)} == {State.FAILED}
    assert Failures(client).list() == []
    look(client)
    assert {each.id for each in Failures(client).list()} == {child.id, grandchild.id}
    assert client.ttl("smallcat:failed") > 0  # type: ignore[operator]
    nothing_is_left(client)


# --- at the workers --------------------------------------------------------------------------------------


def test_a_stray_message_of_a_waiting_job_waits_too(records: Records, client: Redis) -> None:
    """It was queued, given up, and submitted again while its parent is rendered once more."""
    parent, child = job_of(1), child_of(job_of(1))
    submit(records, child)
    records.cancel(child.id)
    submit(records, parent)
    assert submit(records, child)
    assert claim(records, "stray", child)[0] is Claim.WAITING
    assert records.get(child.id).state is State.WAITING
    assert not client.exists(attempts_key(child.id))
    finish(records, parent)
    finish(records, child, "released")


OWN, PARENT = "own", "parent"
#: What a producer can write by hand into a record's `waits_for`.
FORGED = pytest.mark.parametrize(
    "forged", ["zzz", "", "f" * 32, OWN, f"{OWN} {'f' * 32}", "f" * 33, "\n", PARENT]
)


def forge(client: Redis, job: Job, forged: str, parent: str = "f" * 32) -> None:
    text = forged.replace(OWN, job.id).replace(PARENT, parent)
    client.hset(job_key(job.id), "waits_for", text)


@FORGED
def test_a_forged_wait_keeps_no_job_from_being_rendered(records: Records, client: Redis, forged: str) -> None:
    job, other = job_of(1), job_of(2)
    for each in (job, other):
        submit(records, each)
    forge(client, job, forged, other.id)
    assert not submit(records, job, "b")
    assert waiting(client) == [job.id, other.id, job.id]
    assert claim(records, "m", job)[0] is Claim.RENDER
    assert records.get(job.id).state is State.RUNNING
    assert records.done(done(job))
    nothing_is_left(client)


@FORGED
@pytest.mark.parametrize("looks", [True, False])
def test_a_child_whose_wait_is_overwritten_is_rendered_after_its_parent(
    records: Records, client: Redis, forged: str, looks: bool
) -> None:
    parent, other = job_of(1), job_of(2)
    child = child_of(parent)
    for each in (parent, other, child):
        submit(records, each)
    forge(client, child, forged, other.id)
    if looks:
        look(client)
        # Released too early: its message comes back until the parent is done.
        assert claim(records, "m", child)[0] is Claim.WAITING
    finish(records, parent)
    assert waiting(client).count(child.id) == 1
    finish(records, child)
    nothing_is_left(client)


@FORGED
def test_a_wait_that_nobody_notes_is_ended_by_who_has_the_message(
    records: Records, client: Redis, forged: str
) -> None:
    parent, child = job_of(1), child_of(job_of(1))
    submit(records, child)  # Its parent has no record, and is in the bucket.
    forge(client, child, forged, parent.id)
    assert claim(records, "m", child)[0] is Claim.RENDER


@FORGED
def test_a_child_of_which_all_notes_are_forged_is_released_by_the_next_submission(
    records: Records, client: Redis, forged: str
) -> None:
    parent, child = chain(records, 1)
    forge(client, child, forged, job_of(2).id)
    client.delete(WAITING, f"{job_key(parent.id)}:children")
    finish(records, parent)
    assert not submit(records, child, "b")
    finish(records, child)
    nothing_is_left(client)


def test_a_cycle_that_is_forged_ends(records: Records, client: Redis) -> None:
    jobs = [job_of(1), job_of(2)]
    for job, other in zip(jobs, reversed(jobs), strict=True):
        submit(records, job)
        client.hset(job_key(job.id), "waits_for", other.id)
        client.hset(f"{job_key(job.id)}:children", other.id, "")
        client.hset(WAITING, job.id, "")
    look(client)
    assert {records.get(job.id).state for job in jobs} == {State.QUEUED}
    assert submit(records, child_of(jobs[0]))


def test_a_forged_parent_that_failed_fails_nobody(records: Records, client: Redis) -> None:
    job, other = job_of(1), job_of(2)
    for each in (job, other):
        submit(records, each)
    forge(client, job, other.id)
    client.hset(f"{job_key(other.id)}:children", job.id, "")
    fail(records, client, other)
    assert records.get(job.id).state is not State.FAILED
    assert claim(records, "m2", job)[0] is Claim.RENDER


def test_a_forged_message_of_another_job_is_not_put(records: Records, client: Redis) -> None:
    parent, child = chain(records, 1)
    client.hset(job_key(child.id), "held:x", "smallcat.anything\nany text")
    finish(records, parent)
    assert waiting(client) == [parent.id, child.id]
    assert not client.exists("smallcat.anything")


def test_the_bucket_is_believed_and_not_a_parent_s_record(records: Records, client: Redis) -> None:
    parent, child = job_of(1), child_of(job_of(1))
    client.hset(job_key(parent.id), "state", "queued")
    asked: list[str] = []
    assert claim(records, "m", child, has_picture=lambda each: bool(asked.append(each)))[0] is Claim.WAITING
    assert claim(records, "m", child, has_picture=lambda _: True)[0] is Claim.RENDER
    assert asked == [parent.id]


def test_a_picture_that_comes_although_its_job_waits_ends_the_waiting(
    records: Records, client: Redis
) -> None:
    parent, child = chain(records, 1)
    assert records.done(done(child))
    finish(records, parent)
    assert waiting(client) == [parent.id]
    nothing_is_left(client)


def test_the_wait_of_a_released_job_counts_from_its_release(records: Records, client: Redis) -> None:
    parent, child = chain(records, 1)
    client.hincrbyfloat(job_key(child.id), "submitted_at", -500)
    finish(records, parent)
    _, _, queued_s = records.claim(child, "m", worker="w", lease_s=30, max_attempts=3, queue=QUEUE)
    assert queued_s is not None
    assert queued_s < 100


def test_a_message_that_cannot_be_put_is_put_later(records: Records, client: Redis) -> None:
    """Its list's name is a key of another type."""
    parent, child = chain(records, 1)
    claim(records, "m", parent)
    client.delete(LIST)
    client.set(LIST, "no list")
    assert records.done(done(parent))
    assert records.get(child.id).state is State.WAITING
    client.delete(LIST)
    look(client)
    assert waiting(client) == [child.id]
