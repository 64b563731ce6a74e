"""The digest of the fleet: what producers read stays small, and is what all announcements say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.worker.state.test_fleet import job, served, worker
from worker.contract.queues import queue_of
from worker.state.fleet import ANNOUNCE_TTL_S, Fleet, WorkerInfo
from worker.state.groups import groups_of
from worker.state.keys import BOOK, DIGEST
from worker.state.redis_client import connect

TTL_S = 1_000


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def fleet(client: Redis) -> Fleet:
    return Fleet(client, TTL_S)


def announce_as_before(client: Redis, info: WorkerInfo) -> None:
    """What a worker of version b89d500 does, but for the last announcements."""
    client.set(f"smallcat:worker:{info.name}", info.model_dump_json(exclude_defaults=True), ex=ANNOUNCE_TTL_S)
    client.sadd("smallcat:workers", info.name)


def withdraw_as_before(client: Redis, name: str) -> None:
    client.delete(f"smallcat:worker:{name}")
    client.srem("smallcat:workers", name)


def traffic(client: Redis, do: Callable[[], Any]) -> int:
    """Bytes to and from Redis, about a hundred for the measurement itself."""

    def total() -> int:
        info = client.info("stats")
        return int(info["total_net_input_bytes"]) + int(info["total_net_output_bytes"])

    before = total()
    do()
    return total() - before


def same(fleet: Fleet) -> bool:
    """Whether the digest says what all announcements say."""

    def sort(groups: Any) -> list[Any]:
        return sorted(groups, key=lambda group: group.first)

    return sort(fleet.groups()) == sort(groups_of(fleet.workers()))


def test_the_digest_follows_whoever_comes_changes_and_goes(fleet: Fleet) -> None:
    steps: list[Callable[[], None]] = [
        lambda: fleet.announce(worker("a", "m", "r1", 3.5)),
        lambda: fleet.announce(worker("b", "m", "r1", 1.25)),
        lambda: fleet.announce(worker("c", "n", "r1", 2.0)),
        lambda: fleet.announce(worker("b", "m", "r1", 1.25)),
        lambda: fleet.announce(worker("b", "m", "r2", 9.0)),
        lambda: fleet.announce(worker('"/\\ é', "m", "r2", 4.0)),
        lambda: fleet.withdraw("a"),
        lambda: fleet.withdraw("nobody"),
        lambda: fleet.announce(worker("c", "n", "r1", 5.0)),
        lambda: fleet.announce(worker("c", "n", "r1", 5.0).model_copy(update={"paused": "x"})),
        lambda: fleet.withdraw("b"),
        lambda: fleet.withdraw("c"),
        lambda: fleet.withdraw('"/\\ é'),
    ]
    for step in steps:
        step()
        assert same(fleet)
    assert fleet.groups() == ()


def test_a_worker_that_died_leaves_the_digest_with_the_next_announcement_of_another(
    fleet: Fleet, client: Redis
) -> None:
    fleet.announce(worker("dead", "m"))
    fleet.announce(worker("alive", "n", started_at=2.0))
    client.delete("smallcat:worker:dead")  # As its expiry does.
    client.zadd(f"{BOOK}:until", {"dead": fleet.now() - 1})
    fleet.announce(worker("alive", "n", started_at=2.0))
    assert same(fleet)
    assert fleet.resolve(job()).model == "n"
    assert client.smembers("smallcat:workers") == {"alive"}


def test_without_a_live_worker_there_is_no_digest(fleet: Fleet, client: Redis) -> None:
    fleet.announce(worker("a", "m"))
    assert 0 < client.ttl(DIGEST) <= ANNOUNCE_TTL_S
    client.delete(DIGEST, "smallcat:worker:a")
    queue = queue_of(fleet.resolve(job()))
    assert queue == queue_of(job().resolved(served("m")))
    assert fleet.serving(queue) == 0


def test_the_digest_changes_only_with_what_is_served_and_by_how_many(fleet: Fleet, client: Redis) -> None:
    fleet.announce(worker("a", "m"))
    fleet.announce(worker("b", "m"))
    before = client.get(DIGEST)
    paused = worker("a", "m").model_copy(update={"paused": "the bucket refuses"})
    for info in (worker("b", "m"), worker("a", "m")):
        fleet.announce(info)
        assert client.get(DIGEST) == before
    # One that pauses is one less that takes jobs.
    fleet.announce(paused)
    assert client.get(DIGEST) != before
    assert same(fleet)
    assert (fleet.serving("smallcat.m@r1"), fleet.takers("smallcat.m@r1", job()).paused) == (1, 1)
    again = paused.model_copy(update={"paused": "for another reason"})
    now = client.get(DIGEST)
    fleet.announce(again)
    assert client.get(DIGEST) == now
    fleet.announce(worker("a", "m"))
    assert (fleet.serving("smallcat.m@r1"), fleet.takers("smallcat.m@r1", job()).paused) == (2, 0)
    before = client.get(DIGEST)
    fleet.withdraw("b")
    assert client.get(DIGEST) != before


def test_what_producers_and_workers_read_and_write_does_not_grow_with_the_fleet(
    fleet: Fleet, client: Redis
) -> None:
    infos = [worker(f"worker-{number:03}@host", "m", started_at=1e9 + number) for number in range(300)]
    fleet.announce(infos[0])
    deeds = (
        lambda: fleet.resolve(job()),
        lambda: fleet.serving("smallcat.m@r1"),
        lambda: fleet.announce(infos[0]),
    )
    alone = [traffic(client, deed) for deed in deeds]
    for info in infos[1:]:
        fleet.announce(info)
    grown = [traffic(client, deed) for deed in deeds]
    assert grown == [pytest.approx(before, abs=100) for before in alone]
    assert fleet.serving("smallcat.m@r1") == len(infos)
    joins = traffic(client, lambda: fleet.announce(worker("one more", "m", started_at=2e9)))
    assert joins < 8_000


# --- beside workers and producers of earlier versions -----------------------------------------------------


def test_a_worker_of_an_earlier_version_is_seen_beside_those_of_this_one(fleet: Fleet, client: Redis) -> None:
    fleet.announce(worker("new", "m", "r1", started_at=2.0))
    announce_as_before(client, worker("old", "n", "r1", started_at=1.0))
    fleet.announce(worker("new", "m", "r1", started_at=2.0))
    assert same(fleet)
    assert fleet.resolve(job()).model == "n"
    assert fleet.serving("smallcat.n@r1") == 1
    # Once it is gone, its models are no longer served.
    withdraw_as_before(client, "old")
    assert fleet.resolve(job()).model == "m"
    fleet.announce(worker("new", "m", "r1", started_at=2.0))
    assert json.loads(client.get(DIGEST) or "")["mixed"] is False


def test_workers_of_an_earlier_version_alone_are_seen(fleet: Fleet, client: Redis) -> None:
    announce_as_before(client, worker("old", "m"))
    assert fleet.resolve(job()).model == "m"
    assert fleet.serving("smallcat.m@r1") == 1


def test_names_that_dead_workers_of_an_earlier_version_left_are_removed(fleet: Fleet, client: Redis) -> None:
    client.sadd("smallcat:workers", "dead")
    fleet.announce(worker("new", "m"))
    assert client.smembers("smallcat:workers") == {"new"}
    assert json.loads(client.get(DIGEST) or "")["mixed"] is False


def test_producers_of_an_earlier_version_find_the_workers_and_what_was_last_seen(
    fleet: Fleet, client: Redis
) -> None:
    for name, revision, started_at in (("a", "old", 1.0), ("b", "new", 2.0), ("c", "old", 3.0)):
        fleet.announce(worker(name, "m", revision, started_at))
    assert [each.name for each in fleet.workers()] == ["a", "b", "c"]
    seen = [WorkerInfo.model_validate(each) for each in json.loads(client.get("smallcat:served") or "")]
    assert (seen[0].served.revision, seen[-1].served.revision) == ("old", "old")
    assert {each.served.revision for each in seen} == {"old", "new"}


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", '{"version": 1, "mixed": false}'])
def test_a_digest_that_cannot_be_read_is_not_used(fleet: Fleet, client: Redis, text: str) -> None:
    fleet.announce(worker("a", "m"))
    client.set(DIGEST, text)
    assert fleet.resolve(job()).model == "m"


def test_nothing_of_the_book_stays_when_the_last_worker_of_this_version_leaves_earlier_ones(
    fleet: Fleet, client: Redis
) -> None:
    fleet.announce(worker("new", "m"))
    announce_as_before(client, worker("old", "m"))
    fleet.withdraw("new")
    keys = [str(key) for key in client.keys(f"{BOOK}*")]
    assert [key for key in keys if client.ttl(key) == -1] == []
