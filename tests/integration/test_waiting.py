"""Consumers that wait: a push wakes few of them, and no message waits for one that died."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from tests.integration.test_transport import Party, client, message, party, server
from tests.integration.transport_harness import Server, wait_until
from worker.broker.fetching import LOOK_AGAIN_S, _warn_of
from worker.broker.scripts import LEAVE
from worker.broker.transport import UNACKED
from worker.broker.waiting import PLACE_MS, ROOM

__all__ = ["client", "party", "server"]

#: As many as wait.
IDLE = 12
#: Seconds: much less than the one after which lists are checked again anyway.
SOON_S = 0.4


def put(client: redis.Redis, count: int = 1, queue: str = "q") -> None:
    client.lpush(queue, *(json.dumps(message()) for _ in range(count)))


def places(client: redis.Redis) -> tuple[int, int]:
    """How many watch, and how many stand in line."""
    keys = [key.decode() for key in client.keys(ROOM + "*")]  # type: ignore[union-attr]
    lines = [key for key in keys if key.endswith(":line")]
    return len(keys) - len(lines), sum(int(client.zcard(line)) for line in lines)


class Idle:
    """Consumers of one queue that wait."""

    def __init__(self, client: redis.Redis, party: Callable[..., Party], count: int) -> None:
        self.client = client
        self.parties = [party() for _ in range(count)]
        self.wait()

    def wait(self) -> None:
        """Tick until all wait."""
        count = len(self.parties)
        wait_until("all wait", lambda: self.tick() or sum(places(self.client)) == count)  # type: ignore[func-returns-value]

    def tick(self) -> None:
        for each in self.parties:
            each.tick(0.001)

    def got(self) -> list[int]:
        return [len(each.messages) for each in self.parties]

    def drain(self, count: int, timeout_s: float) -> float:
        """Seconds until so many messages are here in all."""
        wanted = sum(self.got()) + count
        return wait_until("messages", lambda: self.tick() or sum(self.got()) >= wanted, timeout_s)  # type: ignore[func-returns-value]


@pytest.fixture
def idle(client: redis.Redis, party: Callable[..., Party]) -> Callable[..., Idle]:
    return lambda count=IDLE: Idle(client, party, count)


def watchers(idle: Idle) -> list[Party]:
    names = {idle.client.get(key) for key in idle.client.keys(ROOM + "*:[12]")}  # type: ignore[union-attr]
    return [each for each in idle.parties if each.channel._who.encode() in names]


def fetches(client: redis.Redis) -> int:
    stats = client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


def test_two_watch_and_the_others_stand_in_line(idle: Callable[..., Idle], client: redis.Redis) -> None:
    idle()
    assert places(client) == (2, IDLE - 2)


def test_a_push_wakes_few(idle: Callable[..., Idle], client: redis.Redis) -> None:
    waiting = idle(24)
    woken = []
    for _ in range(5):
        waiting.wait()
        before, began = fetches(client), time.monotonic()
        put(client)
        assert waiting.drain(1, 5) < SOON_S
        for _ in range(5):
            waiting.tick()
        idle_fetches = 24 * (time.monotonic() - began)  # Each looks once a second by itself.
        woken.append(fetches(client) - before - idle_fetches)
    # The one that gets it and looks again, the other watcher, and the one that is called.
    assert sorted(woken)[len(woken) // 2] <= 6


def test_many_messages_at_once_wake_all(idle: Callable[..., Idle], client: redis.Redis) -> None:
    waiting = idle()
    put(client, IDLE)
    assert waiting.drain(IDLE, 5) < SOON_S
    assert sum(1 for each in waiting.got() if each) > 2


def test_messages_one_by_one_go_to_all_in_turn(idle: Callable[..., Idle], client: redis.Redis) -> None:
    waiting = idle(4)
    for _ in range(8):
        put(client)
        waiting.drain(1, 5)
        waiting.wait()
    assert sum(1 for each in waiting.got() if each) > 2


def test_one_watcher_that_dies_delays_nothing(idle: Callable[..., Idle], client: redis.Redis) -> None:
    waiting = idle()
    dead = watchers(waiting)[0]
    waiting.parties.remove(dead)
    put(client)
    assert waiting.drain(1, 5) < SOON_S


def test_those_in_line_that_died_are_passed_over(idle: Callable[..., Idle], client: redis.Redis) -> None:
    waiting = idle()
    alive = watchers(waiting)
    in_line = [each for each in waiting.parties if each not in alive]
    for each in in_line[:-1]:
        each.channel.client.connection._sock.shutdown(socket.SHUT_RDWR)
    wait_until("their connections are closed", lambda: len(client.pubsub_channels()) == 3)  # type: ignore[arg-type]
    waiting.parties = [*alive, in_line[-1]]
    put(client, 3)
    assert waiting.drain(3, 5) < SOON_S


def test_when_all_who_were_woken_die_the_others_look_by_themselves(
    idle: Callable[..., Idle], client: redis.Redis
) -> None:
    """They hang, as a stopped process does: their connections stay, and nothing is heard of them."""
    waiting = idle()
    hanging = watchers(waiting)
    waiting.parties = [each for each in waiting.parties if each not in hanging]
    put(client)
    assert waiting.drain(1, 5) < LOOK_AGAIN_S + 0.5
    # Their places are taken by others in time.
    wait_until("others watch", lambda: waiting.tick() or len(watchers(waiting)) == 2)  # type: ignore[func-returns-value]


def test_one_that_was_called_and_dies_delays_nothing(idle: Callable[..., Idle], client: redis.Redis) -> None:
    waiting = idle()
    first = client.zrange(f"{client.keys(ROOM + '*:line')[0].decode()}", 0, 0)[0]  # type: ignore[index]
    waiting.parties = [each for each in waiting.parties if each.channel._who.encode() != first]
    put(client)
    assert waiting.drain(1, 5) < SOON_S
    put(client)
    assert waiting.drain(1, 5) < SOON_S


def test_one_that_consumes_no_longer_lets_another_watch_at_once(
    idle: Callable[..., Idle], client: redis.Redis
) -> None:
    waiting = idle()
    for each in watchers(waiting):
        each.consumer.cancel()
        waiting.parties.remove(each)
    took_s = wait_until("others watch", lambda: waiting.tick() or len(watchers(waiting)) == 2)  # type: ignore[func-returns-value]
    assert took_s < SOON_S
    put(client)
    assert waiting.drain(1, 5) < SOON_S


def test_a_message_that_comes_while_somebody_begins_to_wait_is_found(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    """Between the fetch that finds nothing and the moment from which Redis reports changes."""
    for consumer in [party() for _ in range(3)]:
        consumer.channel.connection.cycle.on_poll_start()
        wait_until("the fetch is answered", lambda: sum(places(client)) > 0)
        put(client)
        began = time.monotonic()
        consumer.drain(1)
        assert time.monotonic() - began < SOON_S
        consumer.consumer.cancel()
        wait_until("nobody waits", lambda: sum(places(client)) == 0)


def test_places_expire_and_nothing_stays(idle: Callable[..., Idle], client: redis.Redis) -> None:
    idle(3)
    keys = client.keys(ROOM + "*")
    assert keys
    assert all(0 < client.pttl(key) <= 4 * PLACE_MS for key in keys)  # type: ignore[union-attr]


def test_one_that_consumes_again_waits_again(client: redis.Redis, party: Callable[..., Party]) -> None:
    """As Celery's worker does when it has asked its neighbours, or is told to add a queue."""
    consumer = party()
    wait_until("it waits", lambda: consumer.tick() or sum(places(client)) == 1)  # type: ignore[func-returns-value]
    consumer.consumer.cancel()
    consumer.consumer.consume()
    put(client)
    began = time.monotonic()
    consumer.drain(1)
    assert time.monotonic() - began < SOON_S


#: Rights of a user -> what its worker's log says that it lacks: each is less than docs/operations.md has.
LACKING = {
    "~* resetchannels +@all": "+subscribe and &smallcat:worker-only:call:*",
    "~* &* +@all -subscribe": "+subscribe and &smallcat:worker-only:call:*",
    "~* &* +@all -publish": "",
    "~* &* +@all -client|tracking": "+client|tracking",
    "~* &* +@all -exists": "",
}


@pytest.fixture
def limited(client: redis.Redis, server: Server) -> Iterator[Callable[[str], str]]:
    """Give a user rights; returns its URL."""

    def new(rights: str) -> str:
        client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">secret", *rights.split())
        return server.url.replace("redis://", "redis://limited:secret@")

    _warn_of.cache_clear()
    yield new
    client.execute_command("ACL", "DELUSER", "limited")


@pytest.mark.parametrize("rights", LACKING)
def test_a_refusal_loses_no_message_and_says_which_right_is_missing(
    limited: Callable[[str], str],
    client: redis.Redis,
    party: Callable[..., Party],
    caplog: pytest.LogCaptureFixture,
    rights: str,
) -> None:
    """Whatever of waiting is refused: a message that was popped is delivered by that fetch, to everybody."""
    url = limited(rights)
    put(client)
    first = party(url=url)
    began = time.monotonic()
    first.drain(1)
    assert time.monotonic() - began < SOON_S
    parties = [first, *(party(url=url) for _ in range(3))]

    def tick() -> int:
        for each in parties:
            each.tick(0.001)
        return sum(len(each.messages) for each in parties)

    wait_until("all wait", lambda: tick() and sum(places(client)) >= 4)
    put(client, 8)
    # Nobody has to call them: each looks once a second by itself.
    wait_until("all are delivered", lambda: tick() == 9, 5)
    assert client.hlen(UNACKED) == 9
    assert not any(message.headers.get("redelivered") for each in parties for message in each.messages)
    tags = [message.delivery_tag for each in parties for message in each.messages]
    assert len(set(tags)) == 9
    said = [record.message for record in caplog.records if record.name == "smallcat.transport"]
    assert len(said) == bool(LACKING[rights])
    assert all(LACKING[rights] in text for text in said)
    # What producers need is not the remedy.
    assert not any("redis-producer.acl" in text for text in said)


def test_a_watcher_whose_place_went_to_another_leaves_it_alone(
    client: redis.Redis, party: Callable[..., Party]
) -> None:
    """It hung for longer than its place lasts; then it looks, gets a message, and leaves."""
    late = party()
    wait_until("it watches", lambda: late.tick() or places(client) == (1, 0))  # type: ignore[func-returns-value]
    [place] = client.keys(ROOM + "*")  # type: ignore[misc]
    client.set(place, "another", px=60_000)
    room = place.decode().rpartition(":")[0]
    client.eval(LEAVE, 1, room, late.channel._who, "1")
    assert client.get(place) == b"another"
    put(client)
    late.drain(1)
    assert client.get(place) == b"another"
    wait_until("it watches elsewhere", lambda: late.tick() or client.get(f"{room}:2"))  # type: ignore[func-returns-value]
    assert client.get(place) == b"another"
    assert client.pttl(place) > 50_000  # type: ignore[operator]
