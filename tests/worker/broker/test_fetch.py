"""Fetches that bring several messages: by the script, on a real Redis."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from deploy.embedded.servers import ValkeyProcess
from worker.broker import transport
from worker.broker.channel import Channel
from worker.broker.layout import words_of
from worker.broker.scripts import FETCH
from worker.broker.transport import UNACKED, UNACKED_INDEX, open_slots
from worker.contract.queues import SHARES, UNDECODABLE, WEIGHTS, arrivals_of, list_of

QUEUE = "smallcat.m@r"
#: So many wait for each message that a fetch brings beyond the first.
FOR_EACH_MORE = 64


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        yield client


def message(number: int, tag: str = "") -> bytes:
    properties = {"priority": 4, "delivery_tag": tag or str(uuid.uuid4())}
    return json.dumps({"number": number, "properties": properties}).encode()


def put(client: redis.Redis, *messages: bytes, tenant: str = "") -> None:
    client.lpush(list_of(QUEUE, 4, tenant), *messages)
    if tenant:
        client.lpush(arrivals_of(QUEUE, 4), tenant)


def fetch(client: redis.Redis, many: int) -> list[tuple[bytes, bytes | None]]:
    """The messages that a fetch brings, each with its tag."""
    lists = [(arrivals_of(QUEUE, 4), "0"), (list_of(QUEUE, 0), ""), (list_of(QUEUE, 4), "")]
    keys = [UNACKED, UNACKED_INDEX, UNDECODABLE, "", SHARES, WEIGHTS, *(key for key, _ in lists)]
    said = words_of((QUEUE, kind) for _, kind in lists)
    answer: Any = client.eval(FETCH, len(keys), *keys, many, "", "", 0, "9999 60 10 1000 why", *said)
    return list(zip(answer[1::2], answer[2::2], strict=True))


def tag_of(raw: bytes) -> bytes:
    found: str = json.loads(raw)["properties"]["delivery_tag"]
    return found.encode()


def test_a_fetch_brings_as_many_as_there_is_room_for_while_many_wait(client: redis.Redis) -> None:
    waiting = [message(number) for number in range(4 * FOR_EACH_MORE + 1)]
    put(client, *waiting)
    found = fetch(client, 4)
    assert found == [(raw, tag_of(raw)) for raw in waiting[:4]]
    held = client.hgetall(UNACKED)
    assert {tag: json.loads(entry)[0] for tag, entry in held.items()} == {  # type: ignore[union-attr]
        tag: json.loads(raw) for raw, tag in found
    }
    assert set(client.zrange(UNACKED_INDEX, 0, -1)) == {tag for _, tag in found}  # type: ignore[arg-type]
    # One that has room for one gets one.
    assert fetch(client, 1) == [(waiting[4], tag_of(waiting[4]))]


def test_a_short_queue_is_spread_over_all_workers(client: redis.Redis) -> None:
    put(client, *(message(number) for number in range(2 * FOR_EACH_MORE)))
    # The first leaves one less than twice as many.
    assert [len(fetch(client, 8)) for _ in range(3)] == [2, 2, 2]
    client.ltrim(list_of(QUEUE, 4), 0, FOR_EACH_MORE - 1)
    assert [len(fetch(client, 8)) for _ in range(3)] == [1, 1, 1]


def test_what_cannot_be_read_is_set_aside_and_holds_nothing_up(client: redis.Redis) -> None:
    held = message(0)
    again = message(1, tag_of(held).decode())
    put(client, held)
    assert fetch(client, 1)
    rest = [message(number) for number in range(4 * FOR_EACH_MORE)]
    put(client, rest[0], b"no JSON", again, *rest[1:])
    found = fetch(client, 4)
    assert [tag is None for _, tag in found] == [False, True, False, False]
    assert [found[0][0], found[3][0]] == rest[:2]
    # Another message of a tag that is held has a tag of its own.
    tag = found[2][1] or b""
    assert tag.startswith(tag_of(held) + b"#")
    assert tag_of(found[2][0]) == tag
    assert client.llen(UNDECODABLE) == 1


@pytest.mark.parametrize("broken", [UNACKED, UNACKED_INDEX])
def test_what_redis_refuses_to_register_stays_where_it_was(client: redis.Redis, broken: str) -> None:
    put(client, *(message(number) for number in range(4 * FOR_EACH_MORE)))
    before = client.lrange(list_of(QUEUE, 4), 0, -1)
    client.set(broken, "not what it should be")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        fetch(client, 4)
    assert client.lrange(list_of(QUEUE, 4), 0, -1) == before


def test_tenants_messages_are_dealt_out_one_by_one(client: redis.Redis) -> None:
    for tenant in ("acme", "blue"):
        put(client, *(message(number) for number in range(4 * FOR_EACH_MORE)), tenant=tenant)
    assert [len(fetch(client, 8)) for _ in range(3)] == [1, 1, 1]


def test_several_cost_less_than_as_many_fetches(client: redis.Redis) -> None:
    put(client, *(message(number) for number in range(16 * FOR_EACH_MORE)))
    client.config_resetstat()
    assert len(fetch(client, 8)) == 8
    stats: Any = client.info("commandstats")
    calls = sum(
        int(each["calls"]) for name, each in stats.items() if name not in ("cmdstat_info", "cmdstat_config")
    )
    # Of five for a fetch that brings one.
    assert calls / 8 < 2.8


def test_messages_beyond_the_reserve_are_urgent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_slots(14, 5) == 9
    slots = [(12, 2)]
    monkeypatch.setattr(transport, "_slots", lambda: slots[0])
    monkeypatch.setattr(transport, "_urgent", 4)
    assert [open_slots(100, held) for held in (5, 11, 12, 13, 14)] == [7, 1, 2, 1, 0]
    assert [list(transport.open_steps((0, 4, 9), held)) for held in (11, 12)] == [[0, 4, 9], [0, 4]]
    # They may become fewer or more while messages are held.
    slots[0] = 6, 2
    assert [open_slots(100, held) for held in (5, 6, 8, 14)] == [1, 2, 0, -6]
    slots[0] = 200, 50
    assert open_slots(100, 14) == 86


def test_after_one_whose_delivery_fails_the_others_are_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    delivered = []

    def receive(_: Channel, queue: str, raw: bytes, tag: bytes | None) -> None:
        delivered.append((queue, raw, tag))
        if raw == b"bad":
            raise RuntimeError("no")

    monkeypatch.setattr(Channel, "_receive_message", receive)
    found = [(b"one", b"1"), (b"bad", b"2"), (b"three", b"3")]
    with pytest.raises(RuntimeError, match="no"):
        Channel.__new__(Channel)._receive_messages("q", found)
    assert [raw for _, raw, _ in delivered] == [b"one", b"bad", b"three"]
