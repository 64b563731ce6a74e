"""The transport against a real server: what a message may and may not do under each fault.

The first half drives kombu in this process, the second half real workers. `transport_harness` has the
server, the workers and the oracle.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Queue

from tests.integration.transport_app import read_any
from tests.integration.transport_harness import Fleet, Server, TLSProxy, storm, wait_until
from worker.broker import fetching, lease, sending, transport
from worker.broker.fetching import MAX_READ
from worker.broker.layout import words_of
from worker.broker.leases import acknowledge_by_record, acknowledged, postpone
from worker.broker.moves import KEPT_BYTES
from worker.broker.scripts import EXPIRED, FETCH, MOVE, RENEW
from worker.broker.transport import (
    UNACKED,
    UNACKED_INDEX,
    UNDECODABLE_TTL_S,
    broker_url,
    transport_options,
)
from worker.contract.job import FORMAT_VERSION
from worker.contract.queues import PARKED, SHARES, UNDECODABLE, WEIGHTS, list_of, lists_at

LEASE_S = 1.0
#: Seconds after which a consumer checks empty lists without a notice, where a test takes `seldom_checked`.
SELDOM_S = 5.0
#: Keys and arguments of a fetch from the queue "q".
KEYS_OF_ONE = (UNACKED, UNACKED_INDEX, UNDECODABLE, "", SHARES, WEIGHTS, "q")
FETCH_ONE = (*KEYS_OF_ONE, 1, "", "", 0, "1000 60 10 1000 why", *words_of([("q", "")]))
#: A worker process takes seconds to start on a busy machine, and a test may start four.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("transport") / "valkey")
    yield server
    server.stop()


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with server.client() as client:
        client.flushall()
        yield client


class Party:
    """A consumer in this process, and the messages that reached it."""

    def __init__(self, url: str, *queues: str, prefetch: int = 0, **options: Any) -> None:
        settings = (
            transport_options(LEASE_S) | {"unacked_restore_interval": 0.2, "reader": read_any} | options
        )
        self.connection = Connection(broker_url(url), transport_options=settings)
        self.channel: Any = self.connection.channel()
        self.channel.basic_qos(0, prefetch, False)
        self.messages: list[Any] = []
        self.consumer: Any = Consumer(
            self.channel, [Queue(name) for name in queues or ("q",)], on_message=self.messages.append
        )
        self.consumer.consume()

    def drain(self, count: int = 1, timeout_s: float = 10.0) -> list[Any]:
        """Consume until `count` messages more are here."""
        wanted = len(self.messages) + count
        deadline = time.monotonic() + timeout_s
        while len(self.messages) < wanted and time.monotonic() < deadline:
            self.tick()
        assert len(self.messages) >= wanted
        return self.messages[wanted - count : wanted]

    def tick(self, timeout_s: float = 0.05) -> None:
        """Consume for a moment."""
        with contextlib.suppress(TimeoutError):
            self.connection.drain_events(timeout=timeout_s)

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def seldom_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched before `SELDOM_S` is over was fetched because of a notice, however busy the machine."""
    monkeypatch.setattr(fetching, "LOOK_AGAIN_S", SELDOM_S)


@pytest.fixture
def party(server: Server, client: redis.Redis) -> Iterator[Callable[..., Party]]:
    parties: list[Party] = []

    def new(*queues: str, **options: Any) -> Party:
        parties.append(Party(options.pop("url", server.url), *queues, **options))
        return parties[-1]

    yield new
    for each in parties:
        for message in each.messages:
            if not message.acknowledged:
                message.ack()
        each.close()


def publish(server: Server, body: str, queue: str = "q", **options: Any) -> None:
    """What a producer with kombu's own transport does."""
    with Connection(
        server.url, transport_options=transport_options() | options.pop("transport", {})
    ) as stock:
        stock.SimpleQueue(queue).put(body, **options)


def message(body: str = "x", **properties: Any) -> dict[str, Any]:
    """A message as it stands in a list."""
    return {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "text/plain",
        "headers": {},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": "q"},
            "priority": 0,
            "body_encoding": None,
            **properties,
        },
    }


def due(client: redis.Redis, lease_s: float = LEASE_S) -> Any:
    """What a sweep of anyone would restore now."""
    return client.eval(EXPIRED, 2, UNACKED_INDEX, UNACKED, str(lease_s), "100")


def settled(client: redis.Redis) -> Callable[[], bool]:
    return lambda: not client.exists(UNACKED, UNACKED_INDEX)


# The URL and the module.


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost", "smallcat-redis://localhost:6379/0"),
        ("redis://:a;b@[::1]/?db=5&protocol=3", "smallcat-redis://:a%3Bb@[::1]:6379/5"),
        (
            "rediss://u:p%40ss@h:6380/3?ssl_cert_reqs=CERT_NONE",
            "smallcat-rediss://u:p%40ss@h:6380/3?ssl_cert_reqs=none",
        ),
        ("unix://u:p@/run/my redis.sock?db=2", "smallcat-unix://u:p@localhost/run/my%20redis.sock/2"),
        (
            "redis+sentinel://u:p@a:1,b/main/2",
            "smallcat-sentinel://u:p@a:1/a:1,b:26379/main/2",
        ),
    ],
)
def test_a_redis_url_is_mapped(url: str, expected: str) -> None:
    assert broker_url(url) == expected


@pytest.mark.parametrize("url", ["amqp://u:secret@h", "sentinel://u:secret@h", "u:secret@h", ""])
def test_another_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="redis://") as caught:
        broker_url(url)
    assert "secret" not in str(caught.value)


def test_credentials_database_and_tls_survive_the_mapping(tmp_path: Path) -> None:
    (certificates := tmp_path / "ca.pem").touch()
    url = f"rediss://me:p%40ss@example.test:6380/3?ssl_ca_certs={certificates}"
    connection = Connection(broker_url(url))
    assert (connection.userid, connection.password) == ("me", "p@ss")
    assert (connection.hostname, connection.port, connection.virtual_host) == ("example.test", 6380, "3")
    assert connection.ssl == {"ssl_ca_certs": str(certificates)}
    assert "p@ss" not in connection.as_uri()
    assert "p%40ss" not in connection.as_uri()


def test_tls_is_never_dropped_and_verifies_the_server() -> None:
    import ssl

    connection = Connection(broker_url("rediss://example.test"))
    assert connection.transport.client.ssl == {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    unverified = Connection(broker_url("rediss://example.test?ssl_cert_reqs=none"))
    assert unverified.transport.client.ssl == {"ssl_cert_reqs": ssl.CERT_NONE}


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_a_consumer_over_tls_as_a_user_of_another_database(
    server: Server, client: redis.Redis, party: Callable[..., Party], tmp_path: Path
) -> None:
    client.execute_command("ACL", "SETUSER", "me", "on", ">p@ss", "~*", "&*", "+@all")
    proxy = TLSProxy(server, tmp_path)
    url = f"rediss://me:p%40ss@localhost:{proxy.port}/3"
    with server.client(db=3) as third:
        third.lpush("q", json.dumps(message("over TLS")))
        [received] = party(url=f"{url}?ssl_ca_certs={proxy.certificate}").drain(1)
        assert received.payload == "over TLS"
        received.ack()
        wait_until("acknowledged", settled(third))
    with pytest.raises(redis.exceptions.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        Connection(broker_url(url)).connect()
    proxy.close()


def test_importing_the_module_does_not_import_redis() -> None:
    code = "import sys, worker.broker.transport; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


# Fetching.


def test_a_fetch_registers_what_it_pops(client: redis.Redis) -> None:
    raw = json.dumps(message())
    client.lpush("q", raw)
    index, fetched, tag = client.eval(FETCH, 7, *FETCH_ONE)  # type: ignore[misc]
    assert (index, fetched.decode()) == (0, raw)
    assert client.llen("q") == 0
    assert json.loads(client.hget(UNACKED, tag)) == [json.loads(raw), "", "q"]  # type: ignore[arg-type]
    seconds, microseconds = client.time()  # type: ignore[misc]
    assert client.zscore(UNACKED_INDEX, tag) == pytest.approx(seconds + microseconds / 1e6, abs=1)


def test_a_message_under_the_tag_of_one_that_is_held_takes_not_its_place(client: redis.Redis) -> None:
    first = message("first")
    again = {**message("again"), "properties": first["properties"]}
    client.lpush("q", json.dumps(first), json.dumps(again))
    found = [client.eval(FETCH, 7, *FETCH_ONE) for _ in range(2)]
    tags = [tag.decode() for _, _, tag in found]  # type: ignore[misc]
    assert tags[0] == first["properties"]["delivery_tag"]
    assert json.loads(client.hget(UNACKED, tags[0]))[0] == first  # type: ignore[arg-type]
    # It is held beside it, under a tag that it keeps when it comes back.
    assert tags[1].startswith(f"{tags[0]}#")
    again["properties"] = again["properties"] | {"delivery_tag": tags[1]}
    assert json.loads(found[1][1]) == json.loads(client.hget(UNACKED, tags[1]))[0] == again  # type: ignore
    # Once the first one is acknowledged, its tag is free.
    client.hdel(UNACKED, tags[0])
    client.zrem(UNACKED_INDEX, tags[0])
    client.lpush("q", json.dumps(first))
    assert client.eval(FETCH, 7, *FETCH_ONE)[2].decode() == tags[0]  # type: ignore[index]


def test_a_message_whose_repeated_tag_is_written_otherwise_is_set_aside(client: redis.Redis) -> None:
    """In no message of ours: it cannot be given another tag."""
    first = message("first")
    tag = first["properties"]["delivery_tag"]
    escaped = json.dumps(first).replace(tag, f"\\u{ord(tag[0]):04x}{tag[1:]}")
    client.lpush("q", json.dumps(first), escaped)
    tags = [client.eval(FETCH, 7, *FETCH_ONE)[2] for _ in range(2)]  # type: ignore[index]
    assert tags == [tag.encode(), None]
    [aside] = client.lrange(UNDECODABLE, 0, -1)
    assert b"a worker holds a message of its delivery tag" in aside
    assert client.zcard(UNACKED_INDEX) == client.hlen(UNACKED) == 1


@pytest.mark.parametrize("broken", [UNACKED, UNACKED_INDEX])
def test_a_message_that_cannot_be_registered_stays_in_its_queue(client: redis.Redis, broken: str) -> None:
    client.set(broken, "not what it should be")
    raw = json.dumps(message()).encode()
    client.lpush("q", raw)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        client.eval(FETCH, 7, *FETCH_ONE)
    assert client.lrange("q", 0, -1) == [raw]
    client.delete(broken)
    assert settled(client)()


def test_the_most_urgent_message_of_all_queues_is_next(server: Server, party: Callable[..., Party]) -> None:
    for queue, priority in (("a", 9), ("b", 3), ("a", 3), ("b", 0), ("a", 0), ("b", 4)):
        publish(server, f"{priority}", queue, priority=priority)
    bodies = [each.payload for each in party("a", "b").drain(6)]
    assert bodies == sorted(bodies)


def test_queues_take_turns_among_equals(client: redis.Redis, party: Callable[..., Party]) -> None:
    for queue in ("a", "b", "c"):
        client.lpush(queue, *(json.dumps(message(queue)) for _ in range(20)))
    bodies = [each.payload for each in party("a", "b", "c").drain(30)]
    assert {queue: bodies.count(queue) for queue in "abc"} == {"a": 10, "b": 10, "c": 10}


@pytest.mark.usefixtures("seldom_checked")
def test_an_idle_consumer_wakes_for_every_list(client: redis.Redis, party: Callable[..., Party]) -> None:
    consumer = party("a", "b", "c", "d")
    slow = []
    for queue in ("a", "b", "c", "d"):
        for step in range(10):
            consumer.tick()  # All lists are empty, and the consumer knows.
            client.lpush(f"{queue}\x06\x16{step}" if step else queue, json.dumps(message()))
            began = time.monotonic()
            consumer.drain(1)[0].ack()
            slow.append(time.monotonic() - began)
    assert sorted(slow)[len(slow) // 2] < SELDOM_S / 2


def test_no_more_is_fetched_than_may_be_held(client: redis.Redis, party: Callable[..., Party]) -> None:
    client.lpush("q", *(json.dumps(message()) for _ in range(10)))
    consumer = party(prefetch=3)
    first = consumer.drain(3)
    consumer.tick()
    assert (len(consumer.messages), client.llen("q")) == (3, 7)
    first[0].ack()
    consumer.drain(1)
    consumer.tick()
    assert (len(consumer.messages), client.llen("q")) == (4, 6)


def test_a_consumer_that_pauses_fetches_nothing_keeps_what_it_holds_and_goes_on(
    client: redis.Redis, party: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = threading.Event()
    monkeypatch.setattr(transport, "_is_paused", transport._is_paused)
    transport.set_pause(paused.is_set)
    client.lpush("q", json.dumps(message()))
    consumer = party()
    held = consumer.drain(1)[0]
    consumer.tick()  # The list is empty, and the consumer knows.
    paused.set()
    client.lpush("q", *(json.dumps(message()) for _ in range(3)))
    deadline = time.monotonic() + 2 * LEASE_S
    while time.monotonic() < deadline:
        consumer.tick()
    # At most one fetch was on its way.
    assert len(consumer.messages) <= 2
    # What is held is not restored: its lease is renewed.
    assert client.llen("q") + len(consumer.messages) == 4
    assert client.hlen(UNACKED) == len(consumer.messages)
    held.ack()
    paused.clear()
    consumer.drain(4 - len(consumer.messages))
    assert len(consumer.messages) == 4


@pytest.fixture
def reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five slots, two are for messages of priority 0 to 4."""
    monkeypatch.setattr(transport, "_slots", lambda: (3, 2))
    monkeypatch.setattr(transport, "_urgent", 4)


def put(client: redis.Redis, queue: str, priority: int, count: int = 1) -> None:
    name = f"{queue}\x06\x16{priority}" if priority else queue
    client.lpush(name, *(json.dumps(message(f"{priority}", priority=priority)) for _ in range(count)))


@pytest.mark.usefixtures("reserve", "seldom_checked")
def test_the_last_slots_are_for_urgent_messages(client: redis.Redis, party: Callable[..., Party]) -> None:
    put(client, "a", 6, count=20)
    consumer = party("a", "b", prefetch=5)
    consumer.drain(3)
    consumer.tick()
    assert len(consumer.messages) == 3  # The rest wait, and nobody else is asked for.
    for queue, priority in (("b", 4), ("a", 0)):
        began = time.monotonic()
        put(client, queue, priority)
        assert consumer.drain(1)[0].payload == f"{priority}"
        assert time.monotonic() - began < SELDOM_S / 2
    put(client, "a", 0)
    consumer.tick()
    assert len(consumer.messages) == 5  # All slots are filled.


@pytest.mark.usefixtures("reserve", "seldom_checked")
def test_a_slot_that_is_open_to_all_is_filled_at_once(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    put(client, "a", 6, count=20)
    put(client, "b", 5, count=20)
    consumer = party("a", "b", prefetch=5)
    consumer.drain(3)
    for _ in range(5):
        consumer.tick()  # The urgent lists are empty, and the consumer knows.
        began = time.monotonic()
        consumer.messages[0].ack()
        del consumer.messages[0]
        consumer.drain(1)
        assert time.monotonic() - began < SELDOM_S / 2
    # Urgent ones that hold slots leave fewer for the others, which are filled again afterwards.
    put(client, "a", 0, count=2)
    assert [each.payload for each in consumer.drain(2)] == ["0", "0"]
    for each in consumer.messages[:2]:
        each.ack()
    consumer.tick()
    assert len(consumer.messages) == 5
    consumer.messages[2].ack()
    consumer.drain(1)


@pytest.mark.usefixtures("reserve")
def test_urgent_messages_may_have_every_slot(client: redis.Redis, party: Callable[..., Party]) -> None:
    put(client, "q", 6, count=5)
    put(client, "q", 4, count=7)
    consumer = party(prefetch=5)
    assert [each.payload for each in consumer.drain(5)] == ["4"] * 5
    consumer.messages[0].requeue()
    consumer.messages[1].ack()
    assert [each.payload for each in consumer.drain(2)] == ["4"] * 2
    # One that was given back is urgent still; then the others have their share.
    wait_until("given back", lambda: client.llen("q\x06\x164") == 1)
    for each in consumer.messages[2:]:
        each.ack()
    assert [each.payload for each in consumer.drain(3)] == ["4", "6", "6"]
    consumer.tick()
    assert (len(consumer.messages), client.llen("q\x06\x166")) == (10, 3)


def test_one_message_can_be_fetched_without_consuming(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    channel = party("other").channel
    assert channel.basic_get("q") is None
    client.lpush("q", "no message", json.dumps(message("found")))
    found = channel.basic_get("q")
    assert found.payload == "found"
    assert client.hlen(UNACKED) == 1
    found.ack()
    wait_until("acknowledged", settled(client))
    assert client.llen(UNDECODABLE) == 1


def test_a_queue_without_acknowledgements_holds_nothing(server: Server, client: redis.Redis) -> None:
    publish(server, "reply")
    settings = transport_options() | {"reader": read_any}
    with Connection(broker_url(server.url), transport_options=settings) as connection:
        got: list[Any] = []
        with Consumer(connection.channel(), [Queue("q")], on_message=got.append, no_ack=True):
            connection.drain_events(timeout=1)
            wait_until("a reply", lambda: bool(got))
        assert settled(client)()


def test_a_fetch_on_its_way_is_given_back_when_consuming_ends(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    consumer = party()
    raw = message()
    consumer.tick()
    client.lpush("q", json.dumps(raw))
    consumer.channel._brpop_start()
    wait_until("fetched", lambda: client.hlen(UNACKED) == 1)
    consumer.consumer.cancel()
    wait_until("given back", lambda: client.llen("q") == 1)
    assert settled(client)()
    assert not consumer.messages


def found_aside(client: redis.Redis) -> list[bytes]:
    """The messages that were set aside, each with a reason."""
    found = []
    for entry in client.lrange(UNDECODABLE, 0, -1):  # type: ignore[union-attr]
        head, _, raw = entry.partition(b"\n")
        assert json.loads(head)["reason"]
        found.append(raw)
    return found


def test_the_list_of_what_was_set_aside_is_bounded(
    client: redis.Redis, party: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways into it: the fetch's own, and that of a message that was registered."""
    monkeypatch.setattr(fetching, "UNDECODABLE_MAX", 5)
    monkeypatch.setattr(sending, "UNDECODABLE_MAX", 5)
    for number in range(20):
        client.lpush("q", f"no json {number}", json.dumps(message(body_encoding="rot13")))
    client.lpush("q", json.dumps(message("good")))
    assert party().drain(1)[0].payload == "good"
    wait_until("set aside", lambda: client.hlen(UNACKED) == 1)
    assert client.llen(UNDECODABLE) == 5


NONSENSE = [
    b"\xff\xfe\x00",
    b"",
    b"no json",
    b"null",
    b"17",
    b"[]",
    b"{}",
    b'{"properties": null}',
    b'{"properties": {"delivery_tag": 5}}',
    b'{"properties": {"delivery_tag": ""}}',
    b'{"properties": {"delivery_tag": "a"}}' + b" " * 9 + b"}",
    b'{"properties": {"delivery_tag": "\xde"}}',
    b"[" * 100_000,
    json.dumps(message() | {"headers": ["compression"]}).encode(),
    b" " * (MAX_READ + 1),
    json.dumps(message(body_encoding="rot13")).encode(),
    json.dumps(message("abc", body_encoding="base64")).encode(),
    json.dumps(message()).encode().replace(b'"x"', b'"\xff"'),
]


def test_messages_that_nobody_can_read_are_set_aside(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    for raw in NONSENSE:
        client.lpush("q", raw)
    client.lpush("q", json.dumps(message("good")))
    assert party().drain(1)[0].payload == "good"
    wait_until("set aside", lambda: client.llen(UNDECODABLE) == len(NONSENSE))
    assert set(found_aside(client)) == {raw[:KEPT_BYTES] for raw in NONSENSE}
    assert 0 < client.ttl(UNDECODABLE) <= UNDECODABLE_TTL_S
    assert client.hlen(UNACKED) == 1


def test_a_message_that_celery_cannot_read_is_set_aside(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    consumer = party()

    def choke(received: Any) -> None:
        raise KeyError("id")

    consumer.consumer.on_message = choke
    client.lpush("q", json.dumps(message()))
    consumer.tick()
    wait_until("set aside", lambda: client.llen(UNDECODABLE) == 1)
    assert settled(client)()


def test_a_message_that_the_worker_cannot_take_goes_back(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    consumer = party()

    def broken(received: Any) -> None:
        raise RuntimeError("cannot schedule new futures after shutdown")

    consumer.consumer.on_message = broken
    client.lpush("q", json.dumps(message()))
    with pytest.raises(RuntimeError):
        consumer.drain(1)
    wait_until("given back", lambda: client.llen("q") == 1)
    assert settled(client)()


# Holding.


def test_a_held_message_is_never_due(client: redis.Redis, party: Callable[..., Party]) -> None:
    client.lpush("q", json.dumps(message()))
    party().drain(1)
    ends = time.monotonic() + 2.5 * LEASE_S
    wait_until("time passes", lambda: bool(due(client)) or time.monotonic() > ends)
    assert not due(client)


def test_a_lost_engine_lets_the_lease_run_out(
    client: redis.Redis, party: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    client.lpush("q", json.dumps(message()), json.dumps(message()))
    consumer = party(prefetch=2)
    consumer.drain(1)
    monkeypatch.setattr(transport, "_is_alive", lambda: 1 / 0)
    wait_until("due", lambda: bool(due(client)), 3 * LEASE_S)
    consumer.tick()
    assert len(consumer.messages) <= 2
    assert not consumer.channel.qos.can_consume()


def test_only_redis_clock_counts(
    client: redis.Redis, party: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3_600)
    client.lpush("q", json.dumps(message()))
    party().drain(1)
    wait_until("renewed twice", lambda: renewals(client) >= 2)
    seconds, _ = client.time()  # type: ignore[misc]
    [(_, score)] = client.zrange(UNACKED_INDEX, 0, -1, withscores=True)  # type: ignore[misc]
    assert score == pytest.approx(seconds, abs=2)


def renewals(client: redis.Redis, seen: set[float] = set()) -> int:  # noqa: B006 -- it remembers
    """How many different scores messages have had so far."""
    seen.update(score for _, score in client.zrange(UNACKED_INDEX, 0, -1, withscores=True))  # type: ignore[union-attr]
    return len(seen)


def abandoned(client: redis.Redis, exchange: str = "", routing_key: str = "q", **properties: Any) -> str:
    """A message as a dead worker with kombu's own transport leaves it."""
    raw = message("abandoned", **properties)
    tag = str(raw["properties"]["delivery_tag"])
    client.hset(UNACKED, tag, json.dumps([raw, exchange, routing_key]))
    client.zadd(UNACKED_INDEX, {tag: 1.0})
    return tag


def test_what_a_dead_worker_held_comes_back(client: redis.Redis, party: Callable[..., Party]) -> None:
    abandoned(client, priority=4)
    [restored] = party().drain(1)
    assert restored.headers["redelivered"]
    assert restored.delivery_info["redelivered"]
    assert restored.properties["priority"] == 4


def test_a_renewal_is_never_overtaken_by_a_sweep(client: redis.Redis) -> None:
    tag = abandoned(client)
    [(_, score, _)] = due(client)
    client.eval(RENEW, 1, UNACKED_INDEX, tag)
    assert client.eval(MOVE, 3, UNACKED_INDEX, UNACKED, "q", tag, score, "RPUSH", "x") == 0
    assert (client.llen("q"), client.hlen(UNACKED)) == (0, 1)


def test_lists_of_parked_messages_are_fetched_from_once_one_is_there(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    """And before what waits at the same priority. Meanwhile a fetch names one list for each of them."""
    consumer = party()
    lease = consumer.channel.lease
    wait_until("it has looked", lambda: lease.parked == frozenset())
    plain = consumer.channel._lists_at(["q"], [4])[1:]
    parked = lists_at("q", 4, FORMAT_VERSION)[0]
    assert plain == [("q", list_of("q", 4))]
    client.sadd(PARKED, parked, "another")
    client.set("another", "of another type")
    client.lpush(parked, json.dumps(message(body="parked", priority=4)))
    wait_until("it is seen", lambda: lease.parked == {parked})
    assert consumer.channel._lists_at(["q"], [4])[1:] == [("q", parked), *plain]
    [found] = consumer.drain(1)
    assert bytes(found.body) == b"parked"
    found.ack()
    wait_until("it is empty again", lambda: lease.parked == frozenset())


def no_lease_is_left() -> None:
    """Wait until the thread of a lease that was closed has ended."""
    wait_until(
        "no thread left", lambda: "smallcat-lease" not in {each.name for each in threading.enumerate()}
    )


def test_after_an_outage_everybody_renews_before_anybody_sweeps(
    client: redis.Redis, party: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(lease, "monotonic", lambda: clock[0])
    with closing(party("other").channel) as channel:
        keeper = channel._new_lease()
    no_lease_is_left()  # Its own thread would sweep by this clock as well.
    keeper._renew(client)
    clock[0] += LEASE_S
    abandoned(client)
    keeper._sweep(client)  # Redis was away, or this process was: the others may not have renewed either.
    keeper._renew(client)
    keeper._sweep(client)
    assert client.llen("q") == 0
    for _ in range(2):
        clock[0] += LEASE_S / 4
        keeper._renew(client)
    keeper._sweep(client)
    assert client.llen("q") == 1


def test_an_entry_that_nobody_can_read_is_set_aside(client: redis.Redis, party: Callable[..., Party]) -> None:
    client.hset(UNACKED, "tag", b"\xff nonsense")
    client.zadd(UNACKED_INDEX, {"tag": 1, "index without an entry": 1})
    party()
    wait_until("swept", settled(client))
    assert found_aside(client) == [b"\xff nonsense"]


def test_closing_gives_back_in_order(client: redis.Redis, party: Callable[..., Party]) -> None:
    for number in range(5):
        client.lpush("q", json.dumps(message(str(number))))
    consumer = party()
    consumer.drain(5)[1].ack()
    consumer.close()
    assert settled(client)()
    no_lease_is_left()
    bodies = [each.payload for each in party().drain(4)]
    assert bodies == ["0", "2", "3", "4"]


def test_requeued_messages_wait_behind_the_others(client: redis.Redis, party: Callable[..., Party]) -> None:
    for number in range(3):
        client.lpush("q", json.dumps(message(str(number))))
    consumer = party(prefetch=1)
    consumer.drain(1)[0].requeue()
    bodies = []
    for _ in range(3):
        [received] = consumer.drain(1)
        bodies.append(received.payload)
        received.ack()
    assert bodies == ["1", "2", "0"]


# Losing the connection.


def test_a_lost_connection_takes_no_message_with_it(client: redis.Redis, party: Callable[..., Party]) -> None:
    client.lpush("q", json.dumps(message()))
    consumer = party()
    [held] = consumer.drain(1)
    consumer.connection.collect()
    wait_until("renewed", lambda: renewals(client) >= 3)
    assert (client.llen("q"), client.hlen(UNACKED)) == (0, 1)
    held.ack()  # On a channel that is long closed.
    wait_until("acknowledged", settled(client))


def test_an_acknowledgement_is_sent_until_redis_answers(
    server: Server, client: redis.Redis, party: Callable[..., Party]
) -> None:
    client.lpush("q", json.dumps(message()), json.dumps(message()))
    held = party().drain(2)
    with server.frozen():
        began = time.monotonic()
        held[0].ack()
        assert time.monotonic() - began < 0.5  # Nobody waits for Redis.
        time.sleep(LEASE_S)  # Frozen for longer than the lease thread waits for an answer.
    wait_until("the first acknowledged", lambda: client.hlen(UNACKED) == 1)
    server.kill()
    held[1].ack()
    server.start()
    wait_until("the second acknowledged", settled(client))
    assert client.llen("q") == 0


@pytest.mark.parametrize(
    ("record", "holder", "is_over"),
    [
        *(({"state": state}, "", True) for state in ("done", "failed", "cancelled")),
        ({"state": "running", "claim": "another"}, "another copy", True),
        ({"state": "running", "claim": "mine"}, "another copy", True),
        ({"state": "running", "claim": "mine"}, "me", False),
        ({"state": "running", "claim": "mine"}, "", False),
        ({"state": "queued"}, "", False),
        ({}, "", False),
        ("a string", "", False),
    ],
    ids=str,
)
def test_a_message_is_acknowledged_only_if_its_record_says_so_in_the_same_step(
    client: redis.Redis, party: Callable[..., Party], record: object, holder: str, is_over: bool
) -> None:
    """A replica that became the primary may not have what was written just before."""
    client.lpush("q", json.dumps(message()))
    consumer = party()
    [held] = consumer.drain(1)
    if isinstance(record, dict):
        if record:
            client.hset("record", mapping=record)
    else:
        client.set("record", str(record))
    if holder:
        client.hset("attempts", "claim", holder)
    acknowledge_by_record(held.delivery_tag, ("record", "attempts"), ("mine", "me"))
    held.ack()
    if not is_over:
        [again] = consumer.drain(1)
        assert again.delivery_info.get("redelivered")
        again.ack()
    wait_until("settled", settled(client))
    assert client.llen("q") == 0
    assert len(consumer.messages) == (1 if is_over else 2)


def test_the_record_s_word_counts_where_the_acknowledgement_arrives(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    """A message that is in its queue again, because the fetch was lost, stays there."""
    raw = json.dumps(message())
    client.lpush("q", raw)
    consumer = party()
    [held] = consumer.drain(1)
    consumer.channel.basic_qos(0, 1, False)
    client.delete(UNACKED, UNACKED_INDEX)
    client.lpush("r", raw)
    acknowledge_by_record(held.delivery_tag, ("record", "attempts"), ("mine", "me"))
    held.ack()
    assert consumer.channel.lease.flush(5)
    assert client.lrange("r", 0, -1) == [raw.encode()]


@pytest.mark.parametrize("end", ["ack", "requeue"])
def test_what_was_acknowledged_with_the_done_mark_is_sent_no_more(
    client: redis.Redis, party: Callable[..., Party], end: str
) -> None:
    """It keeps its slot until its task ends, and is neither renewed nor moved: somebody may hold it again."""
    client.lpush("q", json.dumps(message()))
    consumer = party()
    [held] = consumer.drain(1)
    acknowledged(held.delivery_tag)
    client.zadd(UNACKED_INDEX, {held.delivery_tag: 9e9})
    lease = consumer.channel.lease
    assert lease.count == 1
    lease._renew(client)
    getattr(held, end)()
    assert lease.flush(5)
    assert lease.count == client.llen("q") == 0
    assert client.zscore(UNACKED_INDEX, held.delivery_tag) == 9e9


def test_a_lease_that_ran_out_is_told_when_it_is_missing_for_the_second_time(
    client: redis.Redis, party: Callable[..., Party], caplog: pytest.LogCaptureFixture
) -> None:
    """The first time it may have been acknowledged with its job's done mark just now."""
    client.lpush("q", json.dumps(message()))
    consumer = party()
    [held] = consumer.drain(1)
    client.delete(UNACKED, UNACKED_INDEX)
    said = f"The lease of message {held.delivery_tag} ran out"
    wait_until("it is told", lambda: said in caplog.text)
    for _ in range(3):
        consumer.channel.lease._renew(client)
    assert caplog.text.count(said) == 1
    held.ack()


def test_a_postponed_message_comes_back_after_its_delay(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    client.lpush("q", json.dumps(message()))
    consumer = party()
    [held] = consumer.drain(1)
    postpone(held.delivery_tag, 1.0)
    held.requeue()
    given_back = time.monotonic()
    wait_until("it waits", lambda: client.zscore(UNACKED_INDEX, held.delivery_tag) is not None)
    [again] = consumer.drain(1)
    assert 0.9 <= time.monotonic() - given_back < 3
    assert again.delivery_info.get("redelivered")
    again.ack()
    wait_until("it is done", settled(client))


def test_a_message_is_not_delayed_unless_it_was_postponed(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    client.lpush("q", json.dumps(message()))
    consumer = party()
    [held] = consumer.drain(1)
    held.requeue()
    [again] = consumer.drain(1, timeout_s=0.8)
    again.ack()


def test_a_full_redis_still_hands_out_renews_and_takes_back(
    server: Server, client: redis.Redis, party: Callable[..., Party]
) -> None:
    client.lpush("q", *(json.dumps(message()) for _ in range(3)))
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("any", "thing")
        consumer = party()
        held = consumer.drain(3)
        wait_until("renewed", lambda: renewals(client) >= 3)
        held[0].ack()
        held[1].requeue()
        wait_until("settled", lambda: client.hlen(UNACKED) >= 1)
        consumer.drain(1)
    finally:
        client.config_set("maxmemory", 0)


def test_every_key_has_the_prefix(server: Server, client: redis.Redis, party: Callable[..., Party]) -> None:
    prefix = {"global_keyprefix": "mine:"}
    client.lpush("mine:q", "nonsense")
    publish(server, "prefixed", transport=prefix)
    consumer = party(**prefix)
    [held] = consumer.drain(1)
    wait_until("set aside", lambda: client.llen("mine:" + UNDECODABLE) == 1)
    assert client.hlen("mine:" + UNACKED) == 1
    assert all(key.startswith(b"mine:") for key in client.scan_iter())  # type: ignore[union-attr]
    held.requeue()
    consumer.drain(1)[0].ack()
    wait_until("settled", lambda: not client.exists("mine:" + UNACKED))


# Real workers.


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def new(**options: Any) -> Fleet:
        fleets.append(Fleet(tmp_path, **options))
        return fleets[-1]

    yield new
    for each in fleets:
        each.close()


def jobs(count: int, name: str = "job") -> list[str]:
    return [f"{name}{number}" for number in range(count)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers that the faults of the next tests must not disturb."""
    fleet = Fleet(tmp_path_factory.mktemp("pair"), lease_s=2.0)
    workers = [fleet.worker(ready=False) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    yield fleet
    fleet.close()


#: For `make test-services`: in `make test`, tests/faults promises the same, and more, of whole workers. These
#: tell whether a fault is the transport's.
OF_TRANSPORT_ALONE = pytest.mark.services


@pytest.mark.parametrize(
    "fault",
    [
        "none",
        *(
            pytest.param(name, marks=OF_TRANSPORT_ALONE)
            for name in ("connections cut", "redis killed", "redis frozen")
        ),
    ],
)
def test_jobs_longer_than_the_lease_run_once(pair: Fleet, fault: str) -> None:
    names = jobs(6, fault.replace(" ", "_"))
    before = len(pair.journal.jobs("end"))
    pair.submit(names, (2.5 if fault == "redis frozen" else 1.5) * pair.lease_s)
    wait_until("all started", lambda: set(names) <= set(pair.journal.jobs("start")))
    if fault == "connections cut":
        pair.server.cut_connections()
    elif fault == "redis killed":
        pair.server.kill()
        time.sleep(1)
        pair.server.start()
    elif fault == "redis frozen":
        with pair.server.frozen():
            time.sleep(1.5 * pair.lease_s)
    pair.journal.wait_for("end", before + len(names))
    wait_until("settled", lambda: not pair.unsettled(), 10)
    # Both work on: nothing is left that would run a second time, and no slot is lost.
    pair.submit(jobs(16, "after_" + fault.replace(" ", "_")), 0.05)
    pair.journal.wait_for("end", before + len(names) + 16)
    assert pair.journal.twice() == []
    assert all(worker.process.poll() is None for worker in pair.workers)


def test_celery_inspect_and_a_broadcast_reach_the_workers(pair: Fleet) -> None:
    control = pair.producer().control
    wait_until("both answer", lambda: len(control.ping(timeout=2)) == 2)


@OF_TRANSPORT_ALONE
def test_a_killed_worker_is_followed_within_its_lease(fleet: Callable[..., Fleet]) -> None:
    group = fleet(lease_s=3.0)
    first = group.worker(concurrency=20)
    group.submit(jobs(20), 60)
    group.journal.wait_for("start", 20)
    group.worker(concurrency=20)
    first.kill()
    took = wait_until("all restarted", lambda: len(group.journal.jobs("start")) == 40)
    assert took < group.lease_s + 2
    assert len(group.journal.twice()) == 20


@OF_TRANSPORT_ALONE
def test_sigkills_lose_no_job(fleet: Callable[..., Fleet]) -> None:
    group = fleet(lease_s=2.0)
    assert storm(group, kills=3, number=signal.SIGKILL) == []
    wait_until("settled", lambda: not group.unsettled(), 3 * group.lease_s)


@OF_TRANSPORT_ALONE
def test_a_stopped_worker_gives_back_what_it_has_not_begun(fleet: Callable[..., Fleet]) -> None:
    group = fleet(lease_s=30.0)
    worker = group.worker(concurrency=2)
    group.submit(jobs(6), 1.0)
    group.journal.wait_for("start", 2)
    assert worker.stop() == 0
    client = group.server.client()
    assert client.llen("celery") == 6 - len(group.journal.jobs("end"))
    assert not group.unsettled()
    assert len(group.journal.jobs("end")) >= 2
    assert group.journal.twice() == []


@OF_TRANSPORT_ALONE
def test_a_worker_empties_a_full_redis(fleet: Callable[..., Fleet]) -> None:
    group = fleet(lease_s=2.0)
    group.submit(jobs(100))
    client = group.server.client()
    client.config_set("maxmemory", 1)
    worker = group.worker()
    group.journal.wait_for("end", 50)
    group.server.cut_connections()
    group.journal.wait_for("end", 100)
    wait_until("settled", lambda: not group.unsettled())
    assert worker.process.poll() is None
    assert group.journal.twice() == []


@pytest.mark.slow
def test_a_worker_that_was_stopped_past_its_lease_goes_on(fleet: Callable[..., Fleet]) -> None:
    group = fleet(lease_s=2.0)
    first, _ = group.worker(concurrency=2), group.worker(concurrency=4)
    group.submit(jobs(6), 1.0)
    group.journal.wait_for("start", 6)
    first.signal(signal.SIGSTOP)
    wait_until("taken over", lambda: len(group.journal.jobs("end")) == 6)
    first.signal(signal.SIGCONT)
    wait_until("ended twice", lambda: len(group.journal.jobs("end")) == 8)
    wait_until("settled", lambda: not group.unsettled())
    group.submit(jobs(20, "after"), 0.5)
    group.journal.wait_for("end", 26)
    assert {line.pid for line in group.journal.lines()[-20:]} == {each.process.pid for each in group.workers}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_a_long_storm_loses_no_job(fleet: Callable[..., Fleet], signal_name: str) -> None:
    group = fleet(lease_s=2.0)
    kills = int(os.environ.get("STORM_KILLS", "30"))
    assert storm(group, kills=kills, number=signal.Signals[signal_name]) == []
    wait_until("settled", lambda: not group.unsettled(), 3 * group.lease_s)
    if signal_name == "SIGTERM":
        assert group.journal.twice() == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_storm_on_kombus_own_transport_loses_some(fleet: Callable[..., Fleet]) -> None:
    kills = int(os.environ.get("STORM_KILLS", "30"))
    assert storm(fleet(lease_s=2.0), kills=kills, number=signal.SIGKILL, transport="stock") != []
