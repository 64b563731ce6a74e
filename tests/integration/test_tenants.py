"""Consumers of a queue in which several tenants wait: nothing is lost on any of a message's ways back."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from tests.integration.test_transport import Party, client, message, no_lease_is_left, party, server, settled
from tests.integration.test_waiting import SOON_S, Idle
from tests.integration.transport_harness import wait_until
from tests.worker.broker.shares_queue import PUT
from worker.broker import transport
from worker.broker.transport import UNACKED, UNACKED_INDEX
from worker.contract.queues import SHARES, URGENT, arrivals_of, list_of

__all__ = ["client", "party", "server"]


def text(tenant: str, step: int = 0, body: str = "x") -> str:
    """A message of a tenant, as far as the transport looks into it."""
    job = {"tenant": tenant} if tenant else {}
    task = base64.b64encode(json.dumps([[{"id": body, "job": job}], {}, {}]).encode()).decode()
    return json.dumps(message(task, priority=step))


def put(client: redis.Redis, tenant: str, step: int = 0, *bodies: str, queue: str = "q") -> None:
    for body in bodies or ("x",):
        client.eval(PUT, 1, list_of(queue, step, tenant), "LPUSH", text(tenant, step, body))


def told(received: Any) -> tuple[str, str]:
    """The tenant and the body of a message."""
    payload = json.loads(base64.b64decode(received.body))[0][0]
    return payload["job"].get("tenant", ""), payload["id"]


def test_tenants_take_turns_and_their_messages_are_acknowledged(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    put(client, "a", 0, *map(str, range(40)))
    put(client, "b", 7, *map(str, range(40)))
    put(client, "", 4, *map(str, range(40)))
    consumer = party(prefetch=1)
    seen = []
    for _ in range(120):
        [received] = consumer.drain(1)
        seen.append(told(received))
        received.ack()
    assert Counter(tenant for tenant, _ in seen[60:90]) == {"a": 10, "b": 10, "": 10}
    for tenant in ("a", "b", ""):
        assert [body for each, body in seen if each == tenant] == list(map(str, range(40)))
    wait_until("acknowledged", settled(client))
    consumer.tick()
    assert not client.exists(arrivals_of("q", 0), arrivals_of("q", 9))


def test_what_a_closing_consumer_holds_goes_back_to_its_tenant_in_order(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    put(client, "a", 6, *"0123")
    put(client, "", 6, "4")
    consumer = party()
    consumer.drain(5)
    assert client.llen(list_of("q", 6, "a")) == 0
    consumer.close()
    assert settled(client)()
    no_lease_is_left()
    assert (client.llen(list_of("q", 6, "a")), client.llen(list_of("q", 6))) == (4, 1)
    found = [told(each) for each in party().drain(5)]
    assert [body for tenant, body in found if tenant == "a"] == ["0", "1", "2", "3"]


def test_a_requeued_message_waits_behind_those_of_its_tenant(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    put(client, "a", 0, *"012")
    consumer = party(prefetch=1)
    consumer.drain(1)[0].requeue()
    bodies = []
    for _ in range(3):
        [received] = consumer.drain(1)
        bodies.append(told(received)[1])
        received.ack()
    assert bodies == ["1", "2", "0"]


def abandoned(client: redis.Redis, raw: str, queue: str = "q") -> None:
    tag = json.loads(raw)["properties"]["delivery_tag"]
    client.hset(UNACKED, tag, f'[{raw},"",{json.dumps(queue)}]')
    client.zadd(UNACKED_INDEX, {tag: 1.0})


def test_what_a_dead_worker_held_of_a_tenant_comes_back_to_it(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    abandoned(client, text("a", 6, "held"))
    party("other")
    wait_until("restored", lambda: client.llen(list_of("q", 6, "a")) == 1)
    [restored] = party().drain(1)
    assert told(restored) == ("a", "held")
    assert restored.headers["redelivered"]


def test_what_a_worker_of_an_earlier_version_restored_is_fetched_as_nobodys(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    """It knows the queue that the message is held for, and no tenant."""
    put(client, "a", 0, "1")
    client.rpush(list_of("q", 0), text("a", 0, "restored"))
    assert sorted(told(each) for each in party().drain(2)) == [("a", "1"), ("a", "restored")]


def test_a_message_that_waits_comes_back_to_its_tenant(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    put(client, "a", 0, "later")
    consumer = party()
    [received] = consumer.drain(1)
    consumer.channel.lease.postpone(received.delivery_tag, 0.3, counts=False)
    received.requeue()
    assert told(consumer.drain(1)[0]) == ("a", "later")


def test_a_tenants_message_wakes_who_waits(client: redis.Redis, party: Callable[..., Party]) -> None:
    idle = Idle(client, party, 6)
    for step in (0, 9, 5):
        put(client, "a", step)
        assert idle.drain(1, 5) < SOON_S
        idle.wait()
    put(client, "a", 9, *"0123")
    put(client, "b", 3, *"01")
    assert idle.drain(6, 5) < SOON_S
    assert sum(1 for each in idle.got() if each) > 1
    idle.wait()


@pytest.fixture
def reserve() -> Iterator[None]:
    transport.set_slots(lambda: (2, 100), URGENT)
    yield
    transport._slots = None


def test_reserved_slots_wait_for_urgent_messages_of_tenants(
    client: redis.Redis, party: Callable[..., Party], reserve: None
) -> None:
    put(client, "a", 6, *"01234")
    consumer = party()
    consumer.drain(2)
    for _ in range(5):
        consumer.tick()
    assert len(consumer.messages) == 2
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    for _ in range(10):
        consumer.tick()
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 20, (
        "it waits, and does not ask"
    )
    put(client, "b", 2, "urgent")
    assert told(consumer.drain(1)[0]) == ("b", "urgent")


def test_tenants_wait_in_queues_with_a_prefix(client: redis.Redis, party: Callable[..., Party]) -> None:
    put(client, "a", 0, "1", queue="mine:q")
    consumer = party(global_keyprefix="mine:")
    assert told(consumer.drain(1)[0]) == ("a", "1")
    keys = [key.decode() for key in client.scan_iter(f"*{SHARES}*")]
    assert keys
    assert all(key.startswith("mine:") for key in keys)


def test_basic_get_takes_what_tenants_have(client: redis.Redis, party: Callable[..., Party]) -> None:
    put(client, "a", 0, "1", "2")
    channel = party("other").channel
    found = [channel.basic_get("q") for _ in range(3)]
    assert [each and told(each)[1] for each in found] == ["1", "2", None]
    for each in found[:2]:
        channel.basic_ack(each.delivery_tag)
