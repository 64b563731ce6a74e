"""A Redis that refuses: workers wait for it and say so once, no attempt counts; producers get a sentence."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import redis

from producer import submit_job
from tests.faults import oracle
from tests.faults.harness import LEASE_S, Ground, wait_until
from worker.contract.errors import QueueError

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)


def administrator(ground: Ground) -> redis.Redis:
    """A client that was connected before, for commands that a refusing server still takes."""
    client = client_of(ground)
    client.config_set("maxclients", 1000)
    return client


def client_of(ground: Ground) -> redis.Redis:
    return redis.Redis.from_url(ground.stack.valkey.url, decode_responses=True)


@contextmanager
def setting(ground: Ground, name: str, value: str) -> Iterator[None]:
    with administrator(ground) as client:
        before = client.config_get(name)[name]
        client.config_set(name, value)
        try:
            yield
        finally:
            client.config_set(name, before)


@contextmanager
def too_few_replicas(ground: Ground) -> Iterator[None]:
    with setting(ground, "min-replicas-to-write", "1"):
        yield


@contextmanager
def full(ground: Ground) -> Iterator[None]:
    with setting(ground, "maxmemory", "1"):
        yield


@contextmanager
def replica(ground: Ground, stale_data: str = "yes") -> Iterator[None]:
    with administrator(ground) as client, setting(ground, "replica-serve-stale-data", stale_data):
        client.replicaof("127.0.0.1", "1")
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")


@contextmanager
def lost_primary(ground: Ground) -> Iterator[None]:
    with replica(ground, "no"):
        yield


@contextmanager
def endless_script(ground: Ground) -> Iterator[None]:
    with administrator(ground) as client, setting(ground, "busy-reply-threshold", "1"):

        def run() -> None:
            with contextlib.suppress(redis.RedisError):
                # Tried once: the script is not to begin again when it is killed.
                url, once = ground.stack.valkey.url, redis.retry.Retry(redis.backoff.NoBackoff(), 0)
                redis.Redis.from_url(url, socket_timeout=None, retry=once).eval("while true do end", 0)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_until("busy", lambda: refuses(client, "BUSY"))
            yield
        finally:
            client.script_kill()
            thread.join()


@contextmanager
def disk_gone(ground: Ground) -> Iterator[None]:
    """Its folder is gone, so that its snapshots fail."""
    folder = ground.stack.valkey.folder
    folder.rename(folder.with_suffix(".gone"))
    shutil.rmtree(folder.with_suffix(".gone"))
    with setting(ground, "save", "1 1"), administrator(ground) as client:
        client.set("x", 1)
        wait_until("a snapshot failed", lambda: client.info()["rdb_last_bgsave_status"] == "err")
        try:
            yield
        finally:
            client.config_set("stop-writes-on-bgsave-error", "no")
            client.delete("x")


@contextmanager
def slow_start(ground: Ground) -> Iterator[None]:
    """It was killed and takes seconds to read its file."""
    valkey = ground.stack.valkey
    with administrator(ground) as client, client.pipeline(transaction=False) as pipe:
        for _ in range(15_000):
            pipe.incr("x")
        pipe.delete("x").execute()
    valkey.kill()
    argv = valkey._argv
    slowly = ["--key-load-delay", "400"]  # Microseconds. It answers after every 1,024 commands.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(valkey, "_argv", lambda: [*argv(), *slowly])
        valkey.launch()
    yield
    valkey.wait_ready()


@contextmanager
def no_rights(ground: Ground) -> Iterator[None]:
    """The worker's user may connect and nothing else; the administrator is another one."""
    with administrator(ground) as client:
        client.execute_command("ACL", "SETUSER", "admin", "on", ">admin", "~*", "&*", "+@all")
        admin = redis.Redis(port=ground.stack.valkey.port, username="admin", password="admin")
        admin.execute_command("ACL", "SETUSER", "default", "-@all", "+@connection")
        try:
            yield
        finally:
            admin.execute_command("ACL", "SETUSER", "default", "+@all")
            admin.close()


@contextmanager
def too_many_clients(ground: Ground) -> Iterator[None]:
    """No client can connect any more, and those that were are cut off."""
    with administrator(ground) as client:
        client.config_set("maxclients", 1)
        client.client_kill_filter(_type="normal", skipme=True)
        client.client_kill_filter(_type="pubsub", skipme=True)
        try:
            yield
        finally:
            client.config_set("maxclients", 1000)


def refuses(client: redis.Redis, code: str) -> bool:
    try:
        client.get("x")
    except redis.RedisError as error:
        return code in str(error)
    return False


#: Said once all is well.
OVER = "is back: it answers all that it refused"
#: How to provoke each, its words, and whether a producer cannot even connect.
REFUSALS: dict[str, tuple[Callable[[Ground], contextlib.AbstractContextManager[None]], str]] = {
    "NOREPLICAS": (too_few_replicas, r"too few replicas follow it .*min-replicas-to-write"),
    "OOM": (full, r"is full .*: wait for workers to drain it"),
    "READONLY": (replica, r"is read-only, a replica .*: wait until it is promoted"),
    "MASTERDOWN": (lost_primary, r"has lost its primary .*: start the primary"),
    "BUSY": (endless_script, r"is busy with a script .*: wait, or end it by SCRIPT KILL"),
    "MISCONF": (disk_gone, r"cannot write to its disk .*: make room there"),
    "LOADING": (slow_start, r"is still loading its data .*: wait"),
    "NOPERM": (no_rights, r"does not allow this user .*rights"),
    "maxclients": (too_many_clients, r"as many clients as it takes .*: raise its maxclients"),
}


#: `make test` provokes these, `make storm` all.
SHORT = ("NOREPLICAS", "NOPERM", "maxclients")


@pytest.mark.parametrize(
    "refusal",
    [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in REFUSALS],
)
def test_a_redis_that_refuses_costs_no_attempt_and_one_line(
    ground: Ground, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than a lease, under a worker with jobs in flight and jobs that wait."""
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    provoke, words = REFUSALS[refusal]
    worker = ground.worker(settings={"SMALLCAT_MAX_ATTEMPTS": "1"})
    with ground.holding() as hold:
        ids = ground.submit(20, hold)
        ground.journal.wait_for("start", ids[:8])
        said = worker.output()
        with provoke(ground):
            with pytest.raises(QueueError, match=words):
                submit_job(ground.job())
            began_s = time.monotonic()
            wait_until("past the lease", lambda: time.monotonic() > began_s + 1.5 * LEASE_S)
    found = oracle.settle(ground)
    assert found.renders_over == 0
    assert worker.running

    def lines(pattern: str) -> list[str]:
        told = worker.output()[len(said) :].splitlines()
        return [line for line in told if "INFO" not in line and re.search(pattern, line)]

    # A worker need not meet one that is full: what it does makes room.
    wait_until("said that it is over", lambda: bool(lines(OVER)) == bool(lines("Jobs wait for it")))
    print(*lines(""), sep="\n")
    assert len(lines(words)) == 1 or (refusal == "OOM" and not lines(words))
    assert len(lines("")) <= 4
    oracle.no_slot_is_lost(ground, worker)
