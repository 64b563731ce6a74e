"""Redis behind a socket, sentinels or TLS: whatever `REDIS_URL` names, all clients of smallcat reach it."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Connection

from deploy.embedded.home import HOST, Home
from deploy.embedded.servers import ValkeyProcess
from producer import submit_job
from producer.cli.doctor import examine
from tests.integration.test_start import refusal
from tests.integration.transport_app import read_any
from tests.integration.transport_harness import Server, TLSProxy, wait_until
from tests.sentinels import Sentinels
from worker.broker.transport import UNACKED, broker_url, transport_options
from worker.contract.errors import QueueError
from worker.contract.redis_pool import Sentinels as AllSentinels
from worker.contract.redis_pool import _newest
from worker.state.redis_client import connect, connect_async, connect_until, queue_errors
from worker.state.shared_scripts import Script


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory, servers: object) -> Iterator[Sentinels]:
    home = Home(None)
    group = Sentinels(home)
    try:
        yield group.start()
    finally:
        group.stop()
        home.close()


@pytest.fixture(scope="module")
def locked_sentinels(servers: object) -> Iterator[Sentinels]:
    home = Home(None)
    group = Sentinels(home, locked=True)
    try:
        yield group.start()
    finally:
        group.stop()
        home.close()


def works(url: str) -> None:
    """Use every client that smallcat has of `url`."""
    assert connect(url, 1).incr("count")

    async def count() -> int:
        async with connect_async(url, 1) as client:
            return int(await client.incr("count"))

    assert asyncio.run(count()) > 1
    options = {**transport_options(5), "reader": read_any}
    with Connection(broker_url(url), transport_options=options) as connection:
        with connection.SimpleQueue("addresses") as queue:
            queue.put("hello")
            message = queue.get(timeout=10)
            assert message.payload == "hello"
            assert connect(url, 1).hlen(UNACKED) == 1
            message.ack()
            wait_until("acknowledged", lambda: not connect(url, 1).exists(UNACKED))
        assert "hunter2" not in connection.as_uri()
        # `celery inspect stats` sends it, without the password.
        assert "hunter2" not in str({**connection.info(), "password": None})


@pytest.mark.parametrize("options", ["?db=5", "?protocol=3", "?protocol=2&db=5", "?virtual_host=5"])
def test_options_of_the_url(valkey: ValkeyProcess, options: str) -> None:
    works(valkey.url.removesuffix("/0") + options)
    assert connect(valkey.url.removesuffix("0") + "5", 1).exists("count") == ("5" in options)


def test_a_socket(sentinels: Sentinels) -> None:
    node = sentinels.primary
    works(f"unix://:{node.password}@{node.socket}?db=1")
    works(f"redis+socket://:{node.password}@{node.socket}?virtual_host=1")
    assert node.client.info("keyspace")["db1"]


def test_sentinels(sentinels: Sentinels) -> None:
    works(sentinels.url)
    works(sentinels.url.replace("/main/0", "/main/3"))


def test_one_of_the_sentinels(sentinels: Sentinels) -> None:
    works(f"redis+sentinel://:{sentinels.password}@{HOST}:{sentinels.sentinels[1].port}/main")


def test_a_sentinel_that_is_gone_is_passed_over(sentinels: Sentinels) -> None:
    works(sentinels.url.replace("@", f"@{HOST}:9,"))


def test_a_sentinel_that_missed_a_failover_is_not_believed(sentinels: Sentinels) -> None:
    def answer(host: str, epoch: int, **other: object) -> dict[str, object]:
        flags = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 2}
        return {"main": {"ip": host, "port": 1, "config-epoch": epoch, **flags, **other}}

    asked = AllSentinels([(HOST, 9)])
    old, new = answer("old", 3), answer("new", 4)
    assert _newest(asked, "main", [old, new, old]) == ("new", 1)
    assert _newest(asked, "main", [old, answer("new", 4, is_sdown=True)]) == ("old", 1)


@pytest.fixture
def replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: object) -> Iterator[list[Server]]:
    """Two servers that know nothing of each other; sentinels say that the first of them is the primary."""
    made = [Server(tmp_path / name) for name in ("first", "second")]
    primaries = list(made)
    monkeypatch.setattr(AllSentinels, "discover_master", lambda *_: (HOST, primaries[0].port))
    yield primaries
    for server in made:
        server.stop()


@pytest.mark.parametrize("how", ["dies", "becomes a replica"])
@pytest.mark.parametrize("patience", ["until stopped", "for seconds"])
def test_a_command_that_is_sent_again_goes_to_the_primary_of_then(
    replaced: list[Server], how: str, patience: str
) -> None:
    """redis-py's own connection goes back to the address that it had."""
    old, new = replaced
    url = f"redis+sentinel://{HOST}:9/main/0"
    client = connect_until(url, threading.Event(), 2) if patience == "until stopped" else connect(url, 20)
    client.set("count", 5)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(client.incr("count")), daemon=True)
    if how == "dies":
        old._process.send_signal(signal.SIGSTOP)
        thread.start()
        wait_until("sent", lambda: bool(client.connection_pool._in_use_connections))
        replaced.remove(old)
        old.kill()
    else:
        old.client().replicaof(HOST, 9)
        replaced.remove(old)
        thread.start()
    thread.join(20)
    assert answers == [1]
    assert new.client().get("count") == b"1"


def test_a_script_that_was_loaded_into_another_server_is_loaded_again(
    replaced: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a primary is replaced, two connections may lead to two servers."""
    old, new = replaced
    replaced.remove(old)
    client = connect(f"redis+sentinel://{HOST}:9/main/0", 5)
    wherever = iter([old.client().script_load])
    load = client.script_load
    monkeypatch.setattr(client, "script_load", lambda text: next(wherever, load)(text))
    assert Script(client, "return redis.call('INCR', KEYS[1])")(keys=["count"]) == 1
    assert new.client().get("count") == b"1"


def _replace_while_it_waits(old: Server, primaries: list[Server]) -> None:
    """Replace `old` once a client of it waits for replicas, and let that wait end as by its time limit."""
    client = old.client(decode_responses=True)
    waits: list[str] = []

    def found() -> bool:
        waits[:] = [each["id"] for each in client.client_list() if each["cmd"] == "wait"]
        return bool(waits)

    wait_until("a client waits", found)
    primaries.remove(old)
    client.client_unblock(int(waits[0]))


def test_a_submission_that_no_replica_confirms_goes_to_the_primary_of_then(
    replaced: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A primary that was cut off, and is demoted later, has no replica and takes writes meanwhile."""
    old, new = replaced
    replica = Server(tmp_path / "replica")
    replica.client().replicaof(HOST, new.port)
    wait_until("follows", lambda: new.client().info("replication")["connected_slaves"] == 1)
    monkeypatch.setenv("REDIS_URL", f"redis+sentinel://{HOST}:9/main/0")
    monkeypatch.setenv("SMALLCAT_WAIT_REPLICAS", "1")
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "20")
    try:
        threading.Thread(target=lambda: _replace_while_it_waits(old, replaced), daemon=True).start()
        assert new.client().exists(f"smallcat:job:{submit_job('a cat', seed=1).id}")
        assert old.client().exists("smallcat:queues")
    finally:
        replica.stop()


def test_sentinels_that_ask_for_the_password(locked_sentinels: Sentinels) -> None:
    works(locked_sentinels.url)


def test_a_service_that_the_sentinels_do_not_know(sentinels: Sentinels) -> None:
    url = sentinels.url.replace("/main/0", "/mymaster")
    with pytest.raises(QueueError) as caught, queue_errors(url):
        connect(url, 0.5).ping()
    assert "mymaster" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def cluster(servers: object) -> Iterator[ValkeyProcess]:
    """A cluster of one node that has all slots."""
    home = Home(None)
    node = ValkeyProcess(home, "cluster")
    argv = node._argv
    node._argv = lambda: [*argv(), "--cluster-enabled", "yes"]  # type: ignore[method-assign]
    try:
        node.start()
        connect(node.url, 1).execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        yield node
    finally:
        node.stop()
        home.close()


CLUSTER = r"^Redis at redis://:\*\*\*@[0-9.:]+/0 is a Redis Cluster \(.*\): smallcat needs one server"


def test_a_cluster_is_recognised_by_producers_the_doctor_and_workers(
    cluster: ValkeyProcess, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", cluster.url)
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    wait_until("the cluster answers", lambda: connect(cluster.url, 1).info("cluster")["cluster_enabled"] == 1)
    with pytest.raises(QueueError, match=CLUSTER):
        submit_job("a small cat")
    finding = next(finding for finding in examine() if finding.what == "redis")
    assert not finding.ok
    assert re.search(CLUSTER, finding.text)
    assert re.search(CLUSTER, refusal({**environment, "REDIS_URL": cluster.url}).removeprefix("smallcat: "))


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
@pytest.mark.parametrize("option", ["ssl_ca_certs={}", "ssl_cert_reqs=CERT_NONE", "ssl_cert_reqs=none"])
def test_tls(tmp_path: Path, option: str) -> None:
    server = Server(tmp_path / "valkey")
    proxy = TLSProxy(server, tmp_path)
    try:
        works(f"rediss://localhost:{proxy.port}/0?{option.format(proxy.certificate)}")
    finally:
        proxy.close()
        server.stop()
