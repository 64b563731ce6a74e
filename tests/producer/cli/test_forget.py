"""`smallcat forget`, with a real Valkey and bucket: what goes, workers that are late, interruptions."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from redis.client import Redis

from producer import JobHandle, submit_job
from producer.cli.forgetting import COUNTED, Forget
from producer.cli.main import cli
from producer.http.tenant_store import TenantStore
from producer.session import session
from tests.worker.engine.fake_runner import SERVED, SOON_S, Faults
from tests.worker.jobs.test_handler import FlakyBucket, Worker
from worker.contract.errors import CallerError, InvalidJobError, PermanentStorageError, UnknownJobError
from worker.contract.job import Job
from worker.contract.message import payload_of
from worker.contract.queues import UNDECODABLE, arrivals_of, queue_of
from worker.state.forgetting import Forgetting, Scope
from worker.state.keys import HTTP_FORGOTTEN, RUNS, WEBHOOKS, attempts_key, job_key, run_key
from worker.state.redis_client import connect
from worker.storage.bucket import Bucket
from worker.storage.deletion import Deletion
from worker.storage.inputs import RENEW_S, Inputs

#: In all that acme's jobs are told by.
SECRET = "acme's secret"


@pytest.fixture
def redis(environment: dict[str, str]) -> Iterator[Redis]:
    with connect(environment["REDIS_URL"], retry_s=2) as client:
        yield client


@pytest.fixture
def storage(environment: dict[str, str]) -> FlakyBucket:
    return FlakyBucket(environment["S3_BUCKET"])


@pytest.fixture
def worker(redis: Redis, storage: FlakyBucket) -> Iterator[Worker]:
    with Worker(redis, storage) as worker:
        yield worker


def job(seed: int, tenant: str = "acme") -> Job:
    prompt = SECRET if tenant == "acme" else "a cat"
    return Job(prompt=prompt, seed=seed, tenant=tenant).resolved(SERVED)


def forget(*words: str) -> Any:
    found = CliRunner().invoke(cli, ["forget", *words, "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def everything(redis: Redis) -> str:
    """All that Redis has, with the bodies of messages decoded."""
    found: list[str] = []
    for key in redis.scan_iter():
        kind = redis.type(key)
        read = {
            "hash": lambda k: redis.hgetall(k),
            "list": lambda k: redis.lrange(k, 0, -1),
            "set": lambda k: redis.smembers(k),
            "zset": lambda k: redis.zrange(k, 0, -1),
            "string": lambda k: redis.get(k),
        }[str(kind)]
        value = read(key)
        shown = sorted(value.items()) if isinstance(value, dict) else value
        found.append(f"{key} {sorted(shown) if isinstance(shown, set) else shown}")
    text = "\n".join(sorted(found))
    bodies = re.findall(r'"body": "([A-Za-z0-9+/=]+)"', text)
    return text + "".join(base64.b64decode(body).decode(errors="replace") for body in bodies)


def keys_in(storage: Bucket) -> list[str]:
    return [uri.split("/", 3)[3] for uri, _ in storage.below(f"s3://{storage.name}/")]


def much(redis: Redis, worker: Worker) -> dict[str, Job]:
    """Of acme a job in every state, a message that nobody reads, and a run; and of others some, too."""
    for tenant in ("acme", "evil"):
        Inputs(worker.storage).put(b"a picture", "image/png", tenant)
    jobs = {
        "done": job(1),
        "trimmed": job(2),
        "failed": job(3),
        "cancelled": job(4),
        "theirs": job(1, "evil"),
    }
    jobs["nobody's"] = job(1, "")
    worker.runner.faults[3] = Faults(prepare=InvalidJobError("no"))
    for name, each in jobs.items():
        worker.records.submitted(each, queue_of(each), f"sub{each.seed}{len(each.tenant)}", f"{each.id}-1")
        if name == "cancelled":
            worker.records.cancel(each.id)
        else:
            assert worker.handle(each, f"{each.id}-1") is None
    redis.delete(job_key(jobs["trimmed"].id))
    jobs["queued"] = job(6)
    submit_job(jobs["queued"], metadata={"who": SECRET})
    jobs["theirs, queued"] = job(6, "evil")
    submit_job(jobs["theirs, queued"])
    waiting = redis.lrange(list_in(redis, jobs["queued"]), 0, -1)
    [raw] = [text for text in waiting if jobs["queued"].id in text]
    redis.lpush(UNDECODABLE, json.dumps({"at": 1, "queue": "q", "reason": "odd", "bytes": 1}) + "\n" + raw)
    for tenant, name in (("acme", "done"), ("evil", "theirs")):
        hook = json.dumps({"url": "https://h", "tenant": tenant})
        entry = json.dumps({"job": jobs[name].id, "own": f"{tenant}'s secret", "hook": hook, "at": "5.0"})
        redis.lpush(f"{WEBHOOKS}:new", f"{'0' * 40} {entry}")
        redis.hset(f"{WEBHOOKS}:of:w{tenant}", mapping={"entry": entry, "host": "h"})
        redis.zadd(f"{WEBHOOKS}:failed", {f"w{tenant}": 1})
    for run, tenant in (("r1", "acme"), ("r2", "evil")):
        redis.hset(run_key(run), mapping={"fed": 1, "created": 5, "tenant": tenant, "files": f"{tenant}.txt"})
        redis.zadd(RUNS, {run: 1})
    return jobs


def list_in(redis: Redis, one: Job) -> str:
    """The list that has the message of a job."""
    for name in redis.scan_iter("smallcat.*", _type="LIST"):
        if any(one.id in text for text in redis.lrange(name, 0, -1)):
            return str(name)
    raise AssertionError(one)


def _payload(one: Job) -> dict[str, Any]:
    return dict(payload_of(one))


COUNTS = {
    "records": 4,
    "submissions": 5,
    "messages": 1,
    "set_aside": 1,
    "runs": 1,
    "notifications": 2,
    "answers": 0,
}
COUNTS |= {"pictures": 2, "lasting_records": 2, "inputs": 1, "older_versions": 0}


def test_a_tenant_is_forgotten_and_others_stay(redis: Redis, worker: Worker, storage: FlakyBucket) -> None:
    jobs = much(redis, worker)
    before, objects = everything(redis), keys_in(storage)
    dry = forget("--tenant", "acme", "--dry-run")
    assert {name: dry[name] for name in COUNTS} == COUNTS
    assert (everything(redis), keys_in(storage)) == (before, objects)

    done = forget("--tenant", "acme")
    assert done == {"scope": "tenant:acme", "dry_run": False, **COUNTS, "kept": []}
    left = everything(redis)
    assert SECRET not in left
    assert "acme.txt" not in left
    assert sorted(keys_in(storage)) == sorted(key for key in objects if "acme" not in key)
    assert len(keys_in(storage)) == 5
    for name in ("theirs", "nobody's"):
        assert worker.records.get(jobs[name].id).state == "done"
    assert worker.records.get(jobs["theirs, queued"].id).state == "queued"
    assert list_in(redis, jobs["theirs, queued"])
    assert redis.zrange(f"{WEBHOOKS}:failed", 0, -1) == ["wevil"]
    assert redis.llen(f"{WEBHOOKS}:new") == 1
    with pytest.raises(UnknownJobError):
        JobHandle(jobs["done"].id, tenant="acme").record()
    assert forget("--tenant", "acme") == {**done, **dict.fromkeys(COUNTS, 0)}


def test_a_tenant_leaves_no_empty_queues_and_keeps_what_it_spent_today(
    redis: Redis, worker: Worker, storage: FlakyBucket
) -> None:
    submit_job(job(6))
    submit_job(job(6, "evil"))
    shared = queue_of(job(6))
    alone = Job(prompt="x", seed=1, tenant="acme", model="made-up", revision="r")
    submit_job(alone)
    redis.hset("smallcat:http:spent:acme", "1", 5)
    assert forget("--tenant", "acme", "--dry-run")["messages"] == 2
    assert redis.smembers("smallcat:queues") == {shared, queue_of(alone)}
    forget("--tenant", "acme")
    assert redis.smembers("smallcat:queues") == {shared}
    assert not redis.keys(f"{queue_of(alone)}*")
    assert redis.exists(arrivals_of(shared, 9)) + redis.exists(arrivals_of(shared, 0)) > 0
    assert 0 < redis.ttl("smallcat:http:spent:acme") <= 86_400


@pytest.mark.slow
def test_a_job_that_was_forgotten_can_be_submitted_anew(
    redis: Redis, worker: Worker, storage: FlakyBucket
) -> None:
    jobs = much(redis, worker)
    forget("--tenant", "acme")
    worker.records.submitted(jobs["done"], queue_of(jobs["done"]), "anew", "m9")
    assert worker.handle(jobs["done"], "m9") is None
    assert worker.records.get(jobs["done"].id).state == "done"
    assert len([key for key in keys_in(storage) if "acme" in key]) == 2


def test_a_message_that_comes_back_ends_its_job_without_a_picture(
    redis: Redis, worker: Worker, storage: FlakyBucket
) -> None:
    jobs = much(redis, worker)
    prepared = list(worker.runner.prepared)
    forget("--tenant", "acme")
    for name in ("queued", "failed", "done"):
        assert worker.handle(jobs[name], f"{jobs[name].id}-1", redelivered=True) is None
    mark = f"r1:0:0:1:{10**9}"
    of_run = job(7)
    assert worker.handler.handle({**_payload(of_run), "run": mark}, f"{of_run.id}-r1-0").delay_s is None
    assert worker.runner.prepared == prepared
    assert "acme" not in "".join(keys_in(storage))


@pytest.mark.parametrize("may_delete", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_worker_that_renders_it_leaves_no_picture(
    redis: Redis,
    worker: Worker,
    storage: FlakyBucket,
    monkeypatch: pytest.MonkeyPatch,
    may_delete: bool,
) -> None:
    one, put, go_on = job(1), threading.Event(), threading.Event()
    original = storage.put

    def late(*arguments: Any) -> None:
        put.set()
        assert go_on.wait(SOON_S)
        original(*arguments)

    monkeypatch.setattr(storage, "put", late)
    if not may_delete:

        def refuse(*_: Any) -> None:
            raise PermanentStorageError("no right to delete")

        monkeypatch.setattr(storage, "delete", refuse)
    worker.submit(one)
    rendering = worker.begin(one, f"{one.id}-1")
    assert put.wait(SOON_S)
    told = threading.Event()
    command = Forget(session(), Scope(tenant="acme"), is_dry=False, tell=lambda _: told.set())
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(command()))
    thread.start()
    # It waits for the worker, which puts the picture now.
    assert told.wait(SOON_S)
    assert redis.exists(attempts_key(one.id))
    go_on.set()
    assert rendering.result(SOON_S) is None
    thread.join(SOON_S)
    assert found[0].counts["records"] == 1
    assert found[0].counts["pictures"] == (0 if may_delete else 1)
    assert keys_in(storage) == []
    assert SECRET not in everything(redis)


def test_a_worker_that_was_frozen_deletes_its_picture(
    redis: Redis, storage: FlakyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim has run out, so that nobody waits for it."""
    one = job(1)
    with Worker(redis, storage, lease_s=0.01) as worker:
        worker.submit(one)
        worker.runner.gate.clear()
        rendering = worker.begin(one, f"{one.id}-1")
        assert worker.runner.entered.wait(SOON_S)
        forget("--tenant", "acme")
        worker.runner.gate.set()
        assert rendering.result(SOON_S) is None
    assert keys_in(storage) == []


class Killed(BaseException):
    """The process dies here."""


STEPS = [(Forgetting, name) for name in ("tell_servers", "runs", "records", "messages", "set_aside")]
STEPS += [(Forgetting, name) for name in ("notifications", "rest")]
STEPS += [(Deletion, "delete"), (Forget, "_wait"), (Forget, "_finish")]


@pytest.mark.parametrize(
    ("owner", "name"),
    # `make test` has the two where most is half done.
    [
        pytest.param(*step, marks=() if step[1] in ("records", "delete") else pytest.mark.slow)
        for step in STEPS
    ],
)
def test_what_was_killed_at_any_step_is_finished_by_the_next_call(
    redis: Redis,
    worker: Worker,
    storage: FlakyBucket,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
) -> None:
    much(redis, worker)
    original = getattr(owner, name)

    def killed(*arguments: Any) -> Any:
        original(*arguments)
        raise Killed

    if name != "_finish":
        monkeypatch.setattr(owner, name, killed)
        # Of the objects, the first two.
        monkeypatch.setattr("worker.storage.deletion.AT_ONCE", 2)
    else:
        monkeypatch.setattr(owner, name, lambda _: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        Forget(session(), Scope(tenant="acme"), is_dry=False)()
    monkeypatch.setattr(owner, name, original)
    done = forget("--tenant", "acme")
    # What was deleted in the request after which it was killed, nobody has counted.
    lost = {"pictures": 1, "lasting_records": 1} if name == "delete" else {}
    assert {counted: done[counted] + lost.get(counted, 0) for counted in COUNTS} == COUNTS
    assert SECRET not in everything(redis)
    assert "acme" not in "".join(keys_in(storage))


def test_one_job_is_forgotten(redis: Redis, worker: Worker, storage: FlakyBucket) -> None:
    jobs = much(redis, worker)
    for name in ("trimmed", "queued", "nobody's"):
        done = forget("--job", jobs[name].id)
        assert done["pictures"] == done["lasting_records"] == (0 if name == "queued" else 1)
        assert jobs[name].id not in "".join(keys_in(storage))
        assert redis.hget(job_key(jobs[name].id), "forgotten") == f"job:{jobs[name].id}"
        assert redis.keys(f"{job_key(jobs[name].id)}:*") == []
    assert worker.records.get(jobs["theirs"].id).state == "done"
    assert len(keys_in(storage)) == 6


def test_what_was_submitted_before_a_time_is_forgotten(
    redis: Redis, worker: Worker, storage: FlakyBucket
) -> None:
    jobs = much(redis, worker)
    redis.hset(job_key(jobs["theirs, queued"].id), "submitted_at", 10**10)
    redis.hset(run_key("r2"), "created", 10**10)
    counts = Forget(session(), Scope(before=redis.time()[0] + 100), is_dry=True)().counts
    # A job that was submitted since then may have found it there, and not put it again.
    assert counts["inputs"] == 0
    command = Forget(session(), Scope(before=redis.time()[0] + RENEW_S + 100), is_dry=False)
    counts = command().counts
    assert counts["inputs"] == 2
    assert (counts["records"], counts["messages"], counts["runs"]) == (6, 1, 1)
    assert (counts["pictures"], keys_in(storage)) == (4, [])
    assert SECRET not in everything(redis)
    assert worker.records.get(jobs["theirs, queued"].id).state == "queued"
    assert redis.hexists(HTTP_FORGOTTEN, "before")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "Give one of --tenant, --job and --before."),
        (("--tenant", "a", "--job", "b"), "Give one of --tenant, --job and --before."),
        (("--job", "x"), "job is 'x': an id has 32 hexadecimal digits"),
        (("--before", "soon"), "before is 'soon': write a day as 2026-11-28."),
        (("--before", "2999-01-01"), "which is to come"),
        (("--tenant", "A b"), "tenant is 'A b'"),
        (("--tenant", ""), "tenant is empty"),
        (("--tenant", "sharing"), "with --tenant shared-stock."),
    ],
)
def test_what_cannot_be_forgotten_is_said(redis: Redis, words: tuple[str, ...], part: str) -> None:
    TenantStore(redis).add("sharing", {"pictures": "stock"})
    with pytest.raises(CallerError) as caught:
        forget(*words)
    assert part in str(caught.value)


def test_what_is_counted_is_shown_without_zeros(redis: Redis, worker: Worker, storage: FlakyBucket) -> None:
    shown = CliRunner().invoke(cli, ["forget", "--tenant", "nobody", "--dry-run"])
    assert (shown.exit_code, shown.stdout) == (0, "Would remove nothing: there is nothing.\n")
    much(redis, worker)
    would, removed = (
        CliRunner().invoke(cli, ["forget", "--tenant", "acme", *dry]) for dry in (["--dry-run"], [])
    )
    assert would.stdout.startswith("Would remove:\n")
    assert removed.stdout.startswith("Removed:\n")
    assert all(shown.stdout.count(COUNTED["records"]) == 1 for shown in (would, removed))
    assert "        0  " not in would.stdout + removed.stdout
    assert "HTTP servers delete the files" not in would.stderr
    assert "HTTP servers delete the files" in removed.stderr


def test_an_unknown_job_is_an_error(redis: Redis, storage: FlakyBucket) -> None:
    with pytest.raises(UnknownJobError, match="There is nothing of job 00000"):
        forget("--job", "0" * 32)
