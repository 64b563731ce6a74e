"""Which tenant's message is next: by the scripts, on a real Redis."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.embedded.servers import ValkeyProcess
from tests.worker.broker.shares_queue import SharedQueue
from worker.contract.queues import ARRIVALS, SHARES, URGENT, WEIGHTS, arrivals_of, list_of

#: What a tenant may be ahead, in `shares.lua`.
AHEAD = 16


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        yield client


@pytest.fixture
def queue(client: redis.Redis) -> SharedQueue:
    return SharedQueue(client)


def served(queue: SharedQueue, count: int) -> list[str]:
    found = [queue.fetch() for _ in range(count)]
    return [each[0] for each in found if each is not None]


def test_two_tenants_share_alike_whoever_has_more(queue: SharedQueue) -> None:
    queue.put_many("bulk", 4, 200)
    queue.put_many("few", 4, 40)
    counts = Counter(served(queue, 80))
    assert counts == {"bulk": 40, "few": 40}


def test_a_tenant_that_comes_is_served_at_once(queue: SharedQueue) -> None:
    queue.put_many("bulk", 4, 300)
    served(queue, 100)
    queue.put_many("small", 4, 10)
    assert served(queue, 10) == ["small"] * 10
    # Coming again gains it nothing.
    queue.put_many("small", 4, 40)
    assert Counter(served(queue, 60))["small"] <= 30 + AHEAD


def test_a_tenant_that_comes_again_and_again_has_no_more_than_its_share(queue: SharedQueue) -> None:
    queue.put_many("bulk", 4, 400)
    got = 0
    for _ in range(300):
        queue.put("sly")
        got += served(queue, 1) == ["sly"]
        while (found := queue.fetch()) is not None and found[0] == "sly":
            got += 1
    assert got <= 300 + AHEAD + 2


@pytest.mark.parametrize("weights", [{"a": 3, "b": 1}, {"a": 0.5, "b": 2, "": 1}, {"a": 100, "": 0.25}])
def test_weights_say_how_much_each_gets(
    queue: SharedQueue, client: redis.Redis, weights: dict[str, float]
) -> None:
    client.hset(WEIGHTS, mapping={name: str(each) for name, each in weights.items()})
    for name in weights:
        queue.put_many(name, 4, 400)
    served(queue, 100)  # What each may be ahead.
    counts = Counter(served(queue, 300))
    whole = sum(weights.values())
    for name, weight in weights.items():
        assert counts[name] == pytest.approx(300 * weight / whole, abs=AHEAD * max(weights.values()) / 4 + 3)


@pytest.mark.parametrize("weight", ["", "x", "0", "-1", "1e9", "nan", "inf"])
def test_what_is_no_weight_counts_as_one(queue: SharedQueue, client: redis.Redis, weight: str) -> None:
    client.hset(WEIGHTS, "a", weight)
    queue.put_many("a", 4, 30)
    queue.put_many("b", 4, 30)
    assert Counter(served(queue, 40)) == {"a": 20, "b": 20}


def test_dearer_jobs_count_for_more(queue: SharedQueue) -> None:
    for _ in range(120):
        queue.put("large", cost=4_000_000)
        queue.put("small", cost=1_000_000)
    counts = Counter(served(queue, 100))
    assert counts["small"] == pytest.approx(80, abs=5)


@pytest.mark.parametrize("cost", ["x", -1, 0, 1e300, [], {}, True, None])
def test_what_is_no_cost_counts_as_one(queue: SharedQueue, cost: Any) -> None:
    for _ in range(40):
        queue.put("a", cost=cost)
        queue.put("b")
    assert Counter(served(queue, 60)) == {"a": 30, "b": 30}


def test_jobs_without_a_tenant_are_one_tenant_more(queue: SharedQueue, client: redis.Redis) -> None:
    queue.put_many("a", 4, 100)
    served(queue, 40)
    # A producer of an earlier version tells nobody.
    raws = client.lrange(list_of(queue.name, 4, "a"), 0, 0)
    assert raws
    queue.put_many("", 4, 10)
    assert served(queue, 10) == [""] * 10
    queue.put_many("", 4, 60)
    assert Counter(served(queue, 60))[""] <= 30 + AHEAD


def test_within_a_tenant_the_most_urgent_is_next_and_of_equal_ones_the_oldest(queue: SharedQueue) -> None:
    for step in (9, 5, 4, 0, 5, 0):
        queue.put("a", step)
    found = [queue.fetch() for _ in range(6)]
    assert [each[1:] for each in found if each] == [(0, 4), (0, 6), (4, 3), (5, 2), (5, 5), (9, 1)]


def test_reserved_slots_take_urgent_messages_of_tenants_alone(
    queue: SharedQueue, client: redis.Redis
) -> None:
    queue.put_many("a", 6, 5)
    assert queue.fetch(urgent=True) is None
    assert client.exists(arrivals_of(queue.name, 0)) == 0, "nobody is woken for nothing"
    queue.put("a", 3)
    queue.put("b", URGENT)
    found = [queue.fetch(urgent=True) for _ in range(3)]
    assert sorted(each[:2] for each in found if each) == [("a", 3), ("b", URGENT)]
    assert served(queue, 9) == ["a"] * 5


def test_queues_take_turns_whether_they_have_tenants_or_not(queue: SharedQueue, client: redis.Redis) -> None:
    other = SharedQueue(client, "smallcat.other")
    queue.put_many("a", 4, 3)
    other.put_many("", 4, 3)
    assert queue.fetch(others=[other.name]) == ("a", 4, 1)
    assert other.fetch(others=[queue.name]) == ("", 4, 1)
    other.put_many("b", 4, 2)
    found = [other.fetch(others=[queue.name]) for _ in range(6)]
    assert Counter(each[0] for each in found if each) == {"": 2, "b": 2, "a": 2}


def test_when_all_is_done_nothing_is_left_that_wakes_anybody(queue: SharedQueue, client: redis.Redis) -> None:
    for tenant in ("", "a", "b"):
        for step in (0, 9):
            queue.put_many(tenant, step, 3)
    while queue.fetch() is not None:
        pass
    assert not [key for key in client.scan_iter() if ARRIVALS.encode() in key]
    left = [key for key in client.scan_iter() if key.startswith(SHARES.encode())]
    assert all(0 < client.ttl(key) <= 60 for key in left)  # type: ignore[operator]


def test_what_others_write_into_arrivals_costs_nobody_a_message(
    queue: SharedQueue, client: redis.Redis
) -> None:
    name = arrivals_of(queue.name, 4)
    queue.put_many("a", 4, 2)
    junk = [b"*", b"", b"../x", b"\xff", b"A", b"a" * 41, b"\x06\x16", *(b"none-%d" % n for n in range(500))]
    client.lpush(name, *junk * 3)
    client.rpush(name, *junk)
    assert served(queue, 3) == ["a", "a"]
    assert queue.fetch() is None
    assert client.keys(SHARES + "*") == [] or not client.exists(f"{SHARES}{queue.name}:0")


TENANTS = ("", "a", "b", "c-1")
OPERATIONS = st.lists(
    st.tuples(st.just("put"), st.sampled_from(TENANTS), st.integers(0, 9))
    | st.tuples(st.sampled_from(["fetch", "urgent", "back"]), st.just(""), st.just(0)),
    max_size=60,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPERATIONS, st.dictionaries(st.sampled_from(TENANTS), st.sampled_from([0.5, 1, 2, 7])))
def test_whatever_is_done_each_message_comes_once_and_no_call_finds_nothing_while_one_waits(
    client: redis.Redis, operations: list[tuple[str, str, int]], weights: dict[str, float]
) -> None:
    client.flushall()
    if weights:
        client.hset(WEIGHTS, mapping={name: str(each) for name, each in weights.items()})
    queue = SharedQueue(client)
    waiting: dict[str, list[tuple[int, int]]] = defaultdict(list)
    held: list[tuple[str, int, int]] = []

    def take(*, urgent: bool) -> bool:
        found = queue.fetch(urgent=urgent)
        open_ = [each for mine in waiting.values() for each in mine if not urgent or each[0] <= URGENT]
        assert (found is None) is not bool(open_)
        if found is None:
            return False
        tenant, step, number = found
        mine = [each for each in waiting[tenant] if not urgent or each[0] <= URGENT]
        assert step == min(mine)[0], "the most urgent one of its tenant"
        waiting[tenant].remove((step, number))
        held.append(found)
        return True

    for what, tenant, step in operations:
        if what == "put":
            waiting[tenant].append((step, queue.put(tenant, step)))
        elif what == "back" and held:
            whose, again, number = held.pop()
            queue.put_again(whose, again, number, command="RPUSH")
            waiting[whose].append((again, number))
        elif what != "back":
            take(urgent=what == "urgent")
    while take(urgent=False):
        pass
    assert not any(waiting.values())


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["", "a", "b", "c"]), st.sampled_from([0.5, 1, 2, 4]), min_size=2),
    st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=40),
)
def test_among_tenants_that_wait_none_gets_more_than_its_share(
    client: redis.Redis, weights: dict[str, float], before: list[str]
) -> None:
    """What each has had, divided by its weight, differs by what one may be ahead, and a job of each."""
    client.flushall()
    client.hset(WEIGHTS, mapping={name: str(each) for name, each in weights.items()})
    queue = SharedQueue(client)
    for tenant in before:
        queue.put(tenant)
    served(queue, len(before) // 2)
    for name in weights:
        queue.put_many(name, 4, 150)
    counts: Counter[str] = Counter()
    for _ in range(140):
        counts.update(served(queue, 1))
        had = {name: counts[name] / weight for name, weight in weights.items()}
        most, least = max(had, key=had.__getitem__), min(had, key=had.__getitem__)
        assert had[most] - had[least] <= AHEAD + 1 / weights[most] + 1 / weights[least] + len(before)


def test_a_fetch_among_a_thousand_tenants_takes_no_more_commands_than_among_ten(
    queue: SharedQueue, client: redis.Redis
) -> None:
    def commands_a_fetch(tenants: int) -> float:
        client.flushall()
        queue = SharedQueue(client)
        for number in range(tenants):
            queue.put_many(f"t{number}", 4, 3)
        served(queue, tenants)  # All are let in.
        client.config_resetstat()
        assert len(set(served(queue, 50 if tenants > 50 else tenants))) > 5
        stats = client.info("commandstats")
        return sum(each["calls"] for name, each in stats.items() if "info" not in name) / min(50, tenants)

    few, many = commands_a_fetch(10), commands_a_fetch(1_000)
    print(f"{few:.1f} commands a fetch among 10 tenants, {many:.1f} among 1,000")
    assert many <= few + 2
    assert many <= 16


def test_a_fetch_without_tenants_takes_the_commands_that_it_took_before(
    queue: SharedQueue, client: redis.Redis
) -> None:
    queue.put_many("", 4, 100)
    client.config_resetstat()
    served(queue, 100)
    stats = client.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}
    assert calls == {
        "evalsha": 100,
        "lmpop": 100,
        "time": 100,
        "zadd": 100,
        "hset": 100,
        "config|resetstat": 1,
    } | ({name: calls[name] for name in calls if name.startswith(("info", "config"))})
