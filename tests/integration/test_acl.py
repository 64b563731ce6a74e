"""The producer's Redis user of deploy/: it can do a producer's work, and nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from deploy.embedded.stack import Stack
from producer import submit_job
from producer.cli import failed
from tests.faults.harness import ROOT, Ground
from worker.contract.errors import JobCancelledError, QueueError, RenderError
from worker.contract.record import State
from worker.state.records import Records

PASSWORD = "a-password"
#: A test may start three processes, on a machine that may be busy.
pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def ground(servers: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A Redis with the user of the file, and a worker."""
    with Stack(workers=0) as stack:
        ground = Ground(stack, tmp_path_factory.mktemp("acl"))
        lines = (ROOT / "deploy" / "redis-producer.acl").read_text().splitlines()
        [user] = [line for line in lines if line.startswith("user ")]
        with ground.redis as client:
            client.execute_command("ACL", "SETUSER", *_words(user.replace("PASSWORD", PASSWORD))[1:])
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
    [handle] = failed.retry(failed.select())
    assert handle.result(timeout=30).state is State.DONE
    assert failed.find() == []


def test_a_producer_feeds_a_prompt_file_and_asks_the_doctor(ground: Ground, url: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    environment = {**ground.stack.environment, "REDIS_URL": url, "PYTHONPATH": str(ROOT)}
    for words in (["ingest", str(prompts)], ["doctor"], ["failed", "list"]):
        done = subprocess.run(
            [sys.executable, "-m", "producer", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert done.returncode == 0, done.stdout + done.stderr


FORBIDDEN: dict[str, Callable[[redis.Redis], object]] = {
    "shut the workers down": lambda client: client.publish("/0.smallcat.pidbox", "{}"),
    "publish a task event": lambda client: client.publish("/0.smallcat.events/task.multi", "{}"),
    "take a job out of the queue": lambda client: client.rpop("smallcat.fake"),
    "delete a queue": lambda client: client.delete("smallcat.fake"),
    "let a queue expire": lambda client: client.expire("smallcat.fake", 1),
    "overwrite a queue": lambda client: client.set("smallcat.fake", "x"),
    "delete a queue by a script": lambda client: client.eval(
        "return redis.call('DEL', KEYS[1])", 1, "smallcat.fake"
    ),
    "acknowledge another's job": lambda client: client.hdel("smallcat:unacked", "tag"),
    "end a lease": lambda client: client.zrem("smallcat:unacked_index", "tag"),
    "pose as a worker": lambda client: client.set("smallcat:worker:me", "{}"),
    "say what is served": lambda client: client.set("smallcat:served", "[]"),
    "use another queue": lambda client: client.lpush("celery", "x"),
    "empty the server": lambda client: client.flushall(),
    "look for keys": lambda client: client.keys("*"),
    "read the configuration": lambda client: client.config_get("*"),
    "read the users": lambda client: client.acl_list(),
    "stop the server": lambda client: client.shutdown(nosave=True),
    "watch the traffic": lambda client: client.execute_command("MONITOR"),
    "close connections": lambda client: client.client_kill_filter(_type="normal"),
}


@pytest.mark.parametrize("deed", FORBIDDEN)
def test_a_producer_cannot(url: str, deed: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.ping()
        with pytest.raises(redis.exceptions.ResponseError, match=r"permission|ACL"):
            FORBIDDEN[deed](client)


def test_a_wrong_password_is_an_error_that_does_not_repeat_it(
    ground: Ground, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", url.replace(PASSWORD, "not-the-password"))
    with pytest.raises(QueueError, match="refuses the password") as caught:
        submit_job(ground.job())
    assert "not-the-password" not in str(caught.value)
