"""The connection to Redis: how long it is tried, and what is said when it fails."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import redis

from deploy.embedded.servers import ValkeyProcess
from deploy.embedded.stack import Stack
from worker.contract.errors import QueueError, UnknownJobError
from worker.state.redis_client import RETRY_EVERY_S, connect, connect_until, queue_errors, within


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where connections are refused for as long as the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"redis://:hunter2@127.0.0.1:{held.getsockname()[1]}/0"


@pytest.fixture
def silence() -> Iterator[str]:
    """An address where connections are taken and never answered, as by a frozen server."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield f"redis://127.0.0.1:{held.getsockname()[1]}/0"


@contextmanager
def lasting(at_least_s: float, at_most_s: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert at_least_s <= time.monotonic() - began <= at_most_s


def sentence(url: str, do: Callable[[], object]) -> str:
    with pytest.raises(QueueError) as caught, queue_errors(url):
        do()
    return str(caught.value)


def test_a_refused_connection_is_tried_again_for_so_long(nobody: str) -> None:
    client = connect(nobody, retry_s=1.0)
    with lasting(0.5, 8.0):
        said = sentence(nobody, client.ping)
    assert said.startswith("Redis at redis://:***@127.0.0.1:")
    assert "is out of reach" in said
    assert said.endswith("start it, or set REDIS_URL.")
    assert "hunter2" not in said


def test_a_server_that_does_not_answer_is_given_up_on(silence: str) -> None:
    with lasting(0.5, 4.5):
        assert "is out of reach" in sentence(silence, connect(silence, retry_s=1.0).ping)


def test_a_connection_that_is_lost_for_good_is_tried_for_so_long_and_no_longer(
    new_stack: Callable[..., Stack],
) -> None:
    """redis-py's retries are nested: what was connected once would be tried as often as they multiply."""
    valkey = new_stack(workers=0).valkey
    client = connect(valkey.url, retry_s=1.0)
    assert client.ping()
    valkey.kill()
    with lasting(0.5, 4.5):
        assert "is out of reach" in sentence(valkey.url, client.ping)
    with lasting(0.5, 4.5):
        assert "is out of reach" in sentence(valkey.url, lambda: client.register_script("return 1")())
    # Back under the same address, it is found again.
    begin = threading.Thread(target=valkey.start)
    begin.start()
    try:
        assert connect(valkey.url, retry_s=20.0).ping()
        assert client.ping()
    finally:
        begin.join()


def test_several_calls_share_their_time(nobody: str) -> None:
    client = connect(nobody, retry_s=30.0)
    with lasting(0.5, 15.0), within(1.0):
        for _ in range(3):
            assert sentence(nobody, client.ping)
    with lasting(0, 15.0), within(0.0):
        assert sentence(nobody, client.ping)


def test_an_inner_limit_does_not_lengthen_the_outer_one(nobody: str) -> None:
    with lasting(0, 15.0), within(0.5), within(60.0):
        assert sentence(nobody, connect(nobody, retry_s=60.0).ping)


def test_a_wrong_password_is_refused_at_once(valkey: ValkeyProcess) -> None:
    wrong = valkey.url.replace(valkey.password, "hunter2")
    with lasting(0, 15.0):
        said = sentence(wrong, connect(wrong, retry_s=60.0).ping)
    assert "refuses the password" in said
    assert said.endswith("check REDIS_URL.")
    assert "hunter2" not in said


def test_a_missing_password_is_refused_at_once(valkey: ValkeyProcess) -> None:
    without = valkey.url.replace(f":{valkey.password}@", "")
    assert "refuses the password" in sentence(without, connect(without, retry_s=60.0).ping)


@pytest.mark.parametrize("write", ["command", "script"])
def test_a_full_server_and_a_replica_say_so(valkey: ValkeyProcess, write: str) -> None:
    client = connect(valkey.url, retry_s=1.0)
    script = client.register_script("return redis.call('SET', KEYS[1], 1)")
    do = {"command": lambda: client.set("x", 1), "script": lambda: script(keys=["x"])}[write]
    client.config_set("maxmemory", 1)
    try:
        said = sentence(valkey.url, do)
        assert "is full" in said
    finally:
        client.config_set("maxmemory", 0)
    client.replicaof("127.0.0.1", "1")
    try:
        said = sentence(valkey.url, do)
        assert "is read-only" in said
        assert said.endswith("use the primary's address.")
    finally:
        client.replicaof("NO", "ONE")
    assert do()


@pytest.mark.parametrize("refusal", ["full", "replica", "disk"])
def test_a_worker_waits_for_as_long_as_redis_takes_no_writes(
    valkey: ValkeyProcess, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.state.redis_client.RETRY_EVERY_S", 0.01)
    server = connect(valkey.url, retry_s=1.0)
    client = connect_until(valkey.url, threading.Event(), 2)
    refuse: Callable[[], object] = {
        "full": lambda: server.config_set("maxmemory", 1),
        "replica": lambda: server.replicaof("127.0.0.1", "1"),
        "disk": lambda: server.set("full-disk", 1),
    }[refusal]
    relent: Callable[[], object] = {
        "full": lambda: server.config_set("maxmemory", 0),
        "replica": lambda: server.replicaof("NO", "ONE"),
        "disk": lambda: server.delete("full-disk"),
    }[refusal]
    # The answer of a server that cannot write its append-only file; here only while a key exists.
    full_disk = "if redis.call('EXISTS', 'full-disk') == 1 then return {err = 'MISCONF Errors writing'} end "
    script = client.register_script(full_disk + "return redis.call('SET', KEYS[1], 1)")
    before = errors_of(server)
    refuse()
    try:
        with ThreadPoolExecutor(1) as pool:
            write = pool.submit(script, keys=["x"])
            try:
                while errors_of(server) < before + 3:
                    assert not write.done()
            finally:
                relent()
            assert write.result(timeout=30)
    finally:
        relent()


def errors_of(server: redis.Redis) -> int:
    """Errors that the server has answered so far, but for those to a script that it did not know."""
    stats = server.info("errorstats")
    return sum(stat["count"] for name, stat in stats.items() if name != "errorstat_NOSCRIPT")


def test_a_worker_that_stops_waits_for_no_redis(nobody: str) -> None:
    stop = threading.Event()
    client = connect_until(nobody, stop, 2)
    with ThreadPoolExecutor(1) as pool, lasting(RETRY_EVERY_S, 15.0):
        ping = pool.submit(sentence, nobody, client.ping)
        with pytest.raises(TimeoutError):
            ping.result(timeout=2 * RETRY_EVERY_S)
        stop.set()
        assert "is out of reach" in ping.result(timeout=15)


def test_hundreds_of_threads_may_wait_at_once(valkey: ValkeyProcess) -> None:
    """Each with a connection of its own, as whoever waits for a job's end has."""
    client = connect(valkey.url, retry_s=1)
    everybody = threading.Barrier(150)

    def wait() -> bool:
        with client.client() as mine:
            mine.ping()
            everybody.wait(20)
            return bool(mine.ping())

    with ThreadPoolExecutor(150) as threads:
        assert all(threads.map(lambda _: wait(), range(150)))


def test_other_errors_pass_as_they_are(valkey: ValkeyProcess) -> None:
    for error in (UnknownJobError("x"), TimeoutError("still queued"), ValueError("x")):
        with pytest.raises(type(error)), queue_errors(valkey.url):
            raise error


def test_every_error_of_redis_py_is_a_queue_error(valkey: ValkeyProcess) -> None:
    def below(kind: type[Exception]) -> Iterator[type[Exception]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    for kind in below(redis.RedisError):
        error = kind.__new__(kind)
        Exception.__init__(error, "reported")
        with pytest.raises(QueueError), queue_errors(valkey.url):
            raise error


def test_threads_share_as_many_connections_as_there_may_be(valkey: ValkeyProcess) -> None:
    with connect_until(valkey.url, threading.Event(), 2) as client, ThreadPoolExecutor(16) as threads:
        before = client.info("stats")["total_connections_received"]
        assert list(threads.map(client.echo, map(str, range(500)))) == [str(each) for each in range(500)]
        assert client.info("stats")["total_connections_received"] <= before + 2
        assert len(client.connection_pool._available_connections) <= 2


def test_a_connection_that_cannot_be_made_is_not_counted(nobody: str) -> None:
    stop = threading.Event()
    stop.set()
    client = connect_until(nobody, stop, 1)
    for _ in range(3):
        with pytest.raises(redis.ConnectionError):
            client.ping()
        assert client.connection_pool._free._value == 1
