"""What becomes of a submission with a webhook is told in the step that ends it, once each, whoever ends it.

Against a real server: what is promised here is promised by its scripts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.worker.engine.fake_runner import job_of
from worker.contract.errors import InvalidJobError, JobCancelledError
from worker.contract.record import JobRecord, State
from worker.contract.webhook import hook_of
from worker.state.keys import TOLD_BY_PRODUCERS, WEBHOOKS, job_key, run_key
from worker.state.notifications import MAX_FAILED, Notification, Notifications, Shares
from worker.state.records import Claim, Records
from worker.state.redis_client import connect

JOB = job_of(1, metadata={"order": [], "big": 2**60})
HOOK = hook_of("https://a.example.com/hook?x=1", "")
OTHER_HOOK = hook_of("https://b.example.com:8443/hook", "", "acme")
CANCELLED = JobCancelledError("The job was cancelled.")
TTL_S = 1_000


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def records(client: Redis) -> Records:
    return Records(client, TTL_S)


@pytest.fixture
def notifications(client: Redis) -> Notifications:
    return Notifications(client)


def submitted(records: Records, *submissions: str, hook: str = HOOK) -> None:
    for each in submissions:
        records.submitted(JOB, "q", each, f"m-{each}", hook=hook)


def claimed(records: Records, message: str = "m-1", run: str = "") -> Claim:
    return records.claim(JOB, message, worker="w", lease_s=30, max_attempts=3, queue="q", run=run)[0]


def done(records: Records, **fields: Any) -> bool:
    return records.done(JobRecord(id=JOB.id, state=State.DONE, job=JOB, uri="s3://b/x.png", **fields))


def told(notifications: Notifications) -> list[dict[str, Any]]:
    """What was told since the last call."""
    found = notifications.take(100, 100, {})
    for each in found:
        notifications.settle(each, "sent")
    return [dict(each.what) for each in found]


def test_a_job_that_is_done_is_told_once_with_what_is_its_submissions_own(
    records: Records, notifications: Notifications
) -> None:
    submitted(records, "1")
    claimed(records)
    assert told(notifications) == []
    assert done(records)
    assert not done(records)
    (one,) = notifications.take(10, 10, {})
    what = dict(one.what)
    assert float(what.pop("at")) > 0
    assert json.loads(what.pop("own"))["metadata"] == JOB.metadata, "as it was sent, to the byte"
    assert what == {"job": JOB.id, "submission": "1", "state": "done", "hook": HOOK, "uri": "s3://b/x.png"}
    digest = hashlib.sha1(f"{JOB.id}:1:done".encode(), usedforsecurity=False).hexdigest()
    assert one.id == f"w{digest}", "it follows from these"
    assert one.host == "a.example.com"


def test_equal_jobs_of_two_callers_are_told_to_each(records: Records, notifications: Notifications) -> None:
    submitted(records, "1")
    submitted(records, "2", hook=OTHER_HOOK)
    submitted(records, "3", hook="")
    claimed(records)
    done(records, cached=True)
    found = {each["submission"]: each for each in told(notifications)}
    assert {name: each["hook"] for name, each in found.items()} == {"1": HOOK, "2": OTHER_HOOK}
    assert found["1"]["cached"] is True


def test_a_job_that_was_done_before_is_told_again_to_who_submits_it_again(
    records: Records, notifications: Notifications
) -> None:
    submitted(records, "1")
    claimed(records)
    done(records)
    assert len(told(notifications)) == 1
    submitted(records, "2")
    assert claimed(records, "m-2") is Claim.RENDER
    done(records, cached=True)
    assert [each["submission"] for each in told(notifications)] == ["2"]


def test_a_submission_that_is_sent_twice_is_told_once(records: Records, notifications: Notifications) -> None:
    submitted(records, "1", "1")
    claimed(records)
    done(records)
    submitted(records, "1")
    assert len(told(notifications)) == 1
    assert not done(records)
    assert told(notifications) == []


def test_a_failure_is_told_with_its_sentence(records: Records, notifications: Notifications) -> None:
    submitted(records, "1")
    claimed(records)
    assert records.failed(JOB.id, "m-1", InvalidJobError("It is wrong."))
    (what,) = told(notifications)
    assert (what["state"], what["error_type"], what["error"]) == ("failed", "InvalidJobError", "It is wrong.")
    assert "uri" not in what


def test_a_cancelled_job_is_told_whoever_ends_it(
    records: Records, notifications: Notifications, client: Redis
) -> None:
    submitted(records, "1", "2")
    records.cancel(JOB.id, "1")
    assert client.llen(TOLD_BY_PRODUCERS) == 1, "producers write where they may"
    assert [each["submission"] for each in told(notifications)] == ["1"]
    records.cancel(JOB.id, "2")
    assert [each["submission"] for each in told(notifications)] == ["2"]
    submitted(records, "3")
    claimed(records, "m-3")
    records.cancel(JOB.id, "3")
    assert told(notifications) == [], "it runs still"
    assert records.cancelled(JOB.id, "m-3", CANCELLED)
    assert [(each["submission"], each["state"]) for each in told(notifications)] == [("3", "cancelled")]


def test_a_job_that_starts_anew_while_it_is_stopped_tells_who_gave_it_up(
    records: Records, notifications: Notifications
) -> None:
    submitted(records, "1")
    claimed(records)
    records.cancel(JOB.id)
    submitted(records, "2")
    assert [(each["submission"], each["state"]) for each in told(notifications)] == [("1", "cancelled")]
    claimed(records, "m-2")
    done(records)
    assert [each["submission"] for each in told(notifications)] == ["2"]


def test_what_an_earlier_worker_ended_is_told_when_the_message_is_found(
    records: Records, notifications: Notifications, client: Redis
) -> None:
    submitted(records, "1")
    client.hset(job_key(JOB.id), mapping={"state": "done", "uri": "s3://b/x.png"})
    assert claimed(records) is Claim.FINAL
    assert [each["state"] for each in told(notifications)] == ["done"]
    submitted(records, "2")
    client.hset(job_key(JOB.id), "state", "done")
    submitted(records, "3", hook="")
    claimed(records, "m-3")
    done(records)
    assert [each["submission"] for each in told(notifications)] == ["2"]


def test_a_producer_that_may_tell_nobody_leaves_it_to_the_worker(
    records: Records, notifications: Notifications, client: Redis, valkey: ValkeyProcess
) -> None:
    """As with the ACL file of an earlier version."""
    rules = ("on", ">word", "~smallcat:job:*", "~smallcat:queues", "~smallcat:latest", "~smallcat:failed")
    client.execute_command("ACL", "SETUSER", "old", *rules, "&*", "+@all")
    with connect(valkey.url.replace("redis://:", "redis://old:").replace(valkey.password, "word"), 1) as old:
        producer = Records(old, TTL_S)
        submitted(producer, "1")
        assert producer.cancel(JOB.id, "1") is State.CANCELLED
        assert notifications.take(10, 10, {}) == []
        assert claimed(records) is Claim.FINAL
        assert [each["state"] for each in told(notifications)] == ["cancelled"]
        submitted(producer, "2", "3")
        producer.cancel(JOB.id, "2")
        claimed(records, "m-3")
        done(records)
        assert {each["submission"]: each["state"] for each in told(notifications)} == {
            "2": "cancelled",
            "3": "done",
        }
    client.execute_command("ACL", "DELUSER", "old")


def test_jobs_without_a_webhook_have_nothing_more_in_redis(records: Records, client: Redis) -> None:
    submitted(records, "1", hook="")
    claimed(records)
    done(records)
    assert not [name for name in client.hkeys(job_key(JOB.id)) if "hook" in str(name)]
    assert client.keys("*webhooks*") == []


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "nonsense",
        f"{'a' * 40} {{",
        f"{'a' * 40} []",
        f"{'a' * 40} {json.dumps({'state': 'done', 'job': 'x'})}",
    ],
)
def test_producers_tell_only_what_is_theirs_to_tell(
    entry: str, notifications: Notifications, client: Redis
) -> None:
    client.lpush(TOLD_BY_PRODUCERS, entry)
    assert notifications.take(10, 10, {}) == []
    assert notifications.untaken() == 0


def test_what_cannot_be_read_is_given_to_the_sender_all_the_same(
    notifications: Notifications, client: Redis
) -> None:
    for number, hook in enumerate(('{"url": 7}', "x", 5, {})):
        client.lpush(TOLD_BY_PRODUCERS, f"{number:040x} {json.dumps({'state': 'cancelled', 'hook': hook})}")
    found = notifications.take(10, 10, {})
    assert [(each.host, each.hook) for each in found[1:]] == [("", {})] * 3
    assert found[0].host == ""


def tell(client: Redis, number: int, host: str = "a.example.com") -> str:
    what = {"state": "done", "job": "j", "hook": json.dumps({"url": f"https://{host}/"})}
    client.lpush(f"{WEBHOOKS}:new", f"{number:040x} {json.dumps(what)}")
    return f"w{number:040x}"


def ids(found: list[Notification]) -> set[str]:
    return {each.id for each in found}


def test_one_that_is_held_comes_back_when_its_sender_is_dead(
    notifications: Notifications, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tell(client, 1)
    monkeypatch.setattr("worker.state.notifications.HELD_S", 0)
    assert ids(notifications.take(10, 10, {})) == {name}
    monkeypatch.setattr("worker.state.notifications.HELD_S", 60)
    (again,) = notifications.take(10, 10, {})
    assert notifications.take(10, 10, {}) == []
    notifications.settle(again, "sent")
    notifications.settle(again, "later", 0.0, "late")
    assert notifications.take(10, 10, {}) == [], "delivered is delivered"
    assert client.keys(f"{WEBHOOKS}*") == []


def test_a_host_gets_no_more_than_its_share_and_holds_up_no_other(
    notifications: Notifications, client: Redis
) -> None:
    slow = {tell(client, number) for number in range(10)}
    quick = tell(client, 10, "b.example.com")
    found = ids(notifications.take(5, 3, {}))
    assert quick in found
    assert len(found & slow) == 3
    assert notifications.take(5, 3, {"a.example.com": 3}) == []
    assert len(notifications.take(5, 3, {"a.example.com": 1})) == 2


def of_tenant(client: Redis, number: int, host: str, tenant: str) -> str:
    what = {"state": "done", "job": "j", "hook": json.dumps({"url": f"https://{host}/", "tenant": tenant})}
    client.lpush(f"{WEBHOOKS}:new", f"{number:040x} {json.dumps(what)}")
    return f"w{number:040x}"


def shares(**given: Any) -> Shares:
    return Shares(
        **{"per_tenant": 4, "alone": 12, "per_name": 6, "per_slow": 1, "tenants": {}, "names": {}} | given
    )


def test_a_tenant_gets_its_share_while_others_wait_and_leaves_room_where_none_do(
    notifications: Notifications, client: Redis
) -> None:
    evil = {of_tenant(client, number, f"h{number}.example.com", "evil") for number in range(30)}
    acme = {of_tenant(client, number, "a.example.com", "acme") for number in range(30, 33)}
    found = ids(notifications.take(7, 8, {}, shares()))
    assert (len(found & evil), found & acme) == (4, acme)
    assert len(notifications.take(9, 8, {}, shares(tenants={"evil": 4}))) == 8, (
        "twelve with those that are sent"
    )
    assert notifications.take(9, 8, {}, shares(tenants={"evil": 12})) == []
    late = of_tenant(client, 40, "b.example.com", "acme")
    assert ids(notifications.take(4, 8, {}, shares(tenants={"evil": 12}))) == {late}


def test_behind_a_tenants_own_at_the_same_host_others_are_taken(
    notifications: Notifications, client: Redis
) -> None:
    for number in range(10):
        of_tenant(client, number, "a.example.com", "evil")
    other = of_tenant(client, 10, "a.example.com", "acme")
    assert ids(notifications.take(4, 8, {}, shares(tenants={"evil": 12}))) == {other}


def test_a_machine_gets_no_more_by_having_many_ports_and_less_while_it_is_slow(
    notifications: Notifications, client: Redis
) -> None:
    for number in range(16):
        of_tenant(client, number, f"a.example.com:{8000 + number}", f"t{number}")
    slow = shares(slow=["a.example.com"])
    assert len(notifications.take(16, 3, {}, slow)) == 1
    assert notifications.take(16, 3, {}, shares(slow=["a.example.com"], names={"a.example.com": 1})) == []
    assert len(notifications.take(16, 3, {}, shares())) == 6


def test_what_is_given_up_is_listed_and_can_be_sent_again(
    notifications: Notifications, client: Redis
) -> None:
    tell(client, 1)
    (one,) = notifications.take(10, 10, {})
    notifications.settle(one, "later", 60, "answered 500")
    assert notifications.take(10, 10, {}) == []
    (waiting,) = notifications.waiting()
    assert (waiting.attempts, waiting.ended, waiting.id) == (1, "answered 500", one.id)
    assert notifications.retry([one.id]) == 1, "at once, where it waits"
    (one,) = notifications.take(10, 10, {})
    assert one.attempts == 0
    notifications.settle(one, "failed", text="answered 410")
    assert notifications.waiting() == []
    (failed,) = notifications.failed()
    assert (failed.ended, failed.host) == ("answered 410", "a.example.com")
    assert notifications.retry([one.id, "unknown"]) == 1
    assert notifications.failed() == []
    assert ids(notifications.take(10, 10, {})) == {one.id}


def test_what_is_given_up_and_told_again_is_sent_again(client: Redis, notifications: Notifications) -> None:
    tell(client, 1)
    (one,) = notifications.take(10, 10, {})
    tell(client, 1)
    assert notifications.take(10, 10, {}) == [], "it is being sent"
    notifications.settle(one, "failed")
    tell(client, 1)
    (again,) = notifications.take(10, 10, {})
    assert (again.id, again.attempts) == (one.id, 0)
    assert notifications.failed() == []


def test_the_list_of_what_is_given_up_is_bounded(
    notifications: Notifications, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_FAILED == 10_000
    monkeypatch.setattr("worker.state.notifications.MAX_FAILED", 2)
    for number in range(4):
        tell(client, number)
        (one,) = notifications.take(10, 10, {})
        notifications.settle(one, "failed", text=str(number))
    assert [each.ended for each in notifications.failed()] == ["3", "2"]
    assert len(client.keys(f"{WEBHOOKS}:of:*")) == 2
    assert all(client.ttl(key) > 0 for key in client.keys(f"{WEBHOOKS}:of:*"))


def test_all_that_is_kept_expires(
    records: Records, notifications: Notifications, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(records, "1", "2", "3", "4")
    records.cancel(JOB.id, "1")
    claimed(records)
    done(records)
    lasting = lambda: [key for key in client.scan_iter("*webhooks*") if client.ttl(key) == -1]  # noqa: E731
    assert client.exists(TOLD_BY_PRODUCERS, f"{WEBHOOKS}:new") == 2
    assert lasting() == []
    for ended, each in zip(("sent", "later", "failed"), notifications.take(3, 3, {}), strict=True):
        notifications.settle(each, ended, 60, "it answered 500")  # type: ignore[arg-type]
        assert lasting() == []
    assert len(notifications.waiting()) == 2
    notifications.retry([notifications.failed()[0].id])
    assert lasting() == []


def begun(client: Redis, jobs: int, total: int | None, of_jobs: bool = False) -> None:
    fields: dict[str, Any] = {"ttl": TTL_S, "fed": jobs, "webhook": HOOK, "created": 7, "rejected": 2}
    fields |= {} if total is None else {"total": total}
    client.hset(run_key("r1"), mapping=fields | ({"webhook_jobs": 1} if of_jobs else {}))


def test_a_run_is_told_when_its_last_job_has_ended(
    records: Records, notifications: Notifications, client: Redis
) -> None:
    begun(client, 2, 2)
    claimed(records, run="r1:0:0:1:5")
    done(records)
    assert told(notifications) == []
    claimed(records, "m-2", run="r1:1:0:2:5")
    (what,) = told(notifications)
    assert float(what.pop("at")) > 0
    assert what == {
        "run": "r1",
        "state": "finished",
        "hook": HOOK,
        "total": 2,
        "done": 2,
        "failed": 0,
        "cancelled": 0,
        "rejected": 2,
    }
    claimed(records, "m-2", run="r1:1:0:2:5")
    assert told(notifications) == []


def test_jobs_of_a_run_are_told_where_that_was_asked_for(
    records: Records, notifications: Notifications, client: Redis
) -> None:
    begun(client, 2, None, of_jobs=True)
    claimed(records, run="r1:1:0:2:5")
    records.failed(JOB.id, "m-1", InvalidJobError("It is wrong."))
    (what,) = told(notifications)
    assert (what["run"], what["number"], what["line"], what["state"]) == ("r1", 1, 2, "failed")
    assert (what["job"], what["error"]) == (JOB.id, "It is wrong.")
    claimed(records, "m-9", run="r1:1:0:2:5")
    assert told(notifications) == [], "each once"
