"""What a tenant has used of its limits, in a real Valkey."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis.client import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.full_redis import full
from worker.state.keys import HTTP_OPEN, HTTP_RATE, HTTP_SPENT, job_key, run_key
from worker.state.redis_client import connect
from worker.state.tenant_limits import TenantLimits

DAY = 86_400


@pytest.fixture
def redis(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, 1) as client:
        yield client


@pytest.fixture
def limits(redis: Redis) -> TenantLimits:
    return TenantLimits(redis, 1_000)


def ids(count: int, start: int = 0) -> list[tuple[str, int]]:
    return [(f"{number:032x}", 10) for number in range(start, start + count)]


def put(redis: Redis, jobs: list[tuple[str, int]], state: str) -> None:
    for job_id, _ in jobs:
        redis.hset(job_key(job_id), "state", state)


def look_now(redis: Redis) -> None:
    """As if the time had come to look at all open jobs."""
    redis.zadd(f"{HTTP_OPEN}t", dict.fromkeys(redis.zrange(f"{HTTP_OPEN}t", 0, -1), 0))


def admit(limits: TenantLimits, jobs: list[tuple[str, int]], most: int = 10, note: str = "") -> int:
    return limits.admit("t", jobs, most_open=most, most_work=None, note=note).jobs


def test_a_bucket_holds_a_burst_and_fills_at_its_rate(redis: Redis, limits: TenantLimits) -> None:
    assert [limits.request("t", 0.5, 3) for _ in range(3)] == [0, 0, 0]
    assert 1 < limits.request("t", 0.5, 3) <= 2
    assert limits.request("other", 0.5, 3) == 0
    # Four seconds later two more have come, and no more than a burst in an hour.
    for later_s, more in ((4, 2), (3_600, 3)):
        redis.hincrbyfloat(f"{HTTP_RATE}t", "at", -later_s)
        assert [limits.request("t", 0.5, 3) for _ in range(more)] == [0] * more
        assert limits.request("t", 0.5, 3) > 0


def test_a_bucket_holds_while_redis_is_full(redis: Redis, limits: TenantLimits) -> None:
    with full(redis):
        assert limits.request("t", 0.01, 1) == 0
        assert limits.request("t", 0.01, 1) > 0


def test_jobs_count_once_and_all_of_a_request_or_none(redis: Redis, limits: TenantLimits) -> None:
    jobs = ids(8)
    assert admit(limits, jobs) == 8
    put(redis, jobs, "queued")
    found = limits.admit("t", ids(3, 8), most_open=10, most_work=None)
    assert (found.jobs, found.open, found.stopped) == (0, 8, "queued")
    assert redis.zcard(f"{HTTP_OPEN}t") == 8
    # Equal jobs, in a list or open already, are one.
    assert admit(limits, [*ids(2, 7), *ids(2, 8)]) == 4
    assert redis.zcard(f"{HTTP_OPEN}t") == 10
    assert limits.admit("other", ids(10), most_open=10, most_work=None).jobs == 10


@pytest.mark.parametrize("state", ["done", "failed", "cancelled", None])
def test_a_job_leaves_however_it_ends(redis: Redis, limits: TenantLimits, state: str | None) -> None:
    assert admit(limits, ids(10)) == 10
    put(redis, ids(10), "running")
    look_now(redis)
    assert admit(limits, ids(1, 10)) == 0
    for job_id, _ in ids(4):
        redis.hset(job_key(job_id), "state", state) if state else redis.delete(job_key(job_id))
    # They were looked at just now.
    assert admit(limits, ids(4, 10)) == 0
    look_now(redis)
    assert admit(limits, ids(5, 10)) == 0
    assert admit(limits, ids(4, 10)) == 4


def test_a_job_that_was_admitted_just_now_may_have_no_record_and_may_have_ended(
    redis: Redis, limits: TenantLimits
) -> None:
    assert admit(limits, ids(10)) == 10
    assert admit(limits, ids(1, 10)) == 0
    put(redis, ids(2, 3), "done")
    assert admit(limits, ids(3, 10)) == 0
    assert admit(limits, ids(2, 10)) == 2


def test_work_is_counted_by_the_day(redis: Redis, limits: TenantLimits) -> None:
    def ask(count: int, note: str = "") -> tuple[int, int, str]:
        found = limits.admit("t", ids(count), most_open=None, most_work=100, note=note)
        assert 0 < found.day_left_s <= DAY
        return found.jobs, found.spent, found.stopped

    redis.hset(f"{HTTP_SPENT}t", str(int(time.time()) // DAY - 1), 100)
    assert ask(6) == (6, 0, "")
    assert ask(5) == (0, 60, "day")
    assert ask(4, "smallcat:http:once:x") == (4, 60, "")
    # The same request again is counted once, as long as it is remembered.
    assert ask(4, "smallcat:http:once:x") == (4, 100, "")
    assert ask(1) == (0, 100, "day")
    limits.give_back("t", ids(4), "smallcat:http:once:x")
    assert ask(4, "smallcat:http:once:x") == (4, 60, "")
    assert len(redis.hgetall(f"{HTTP_SPENT}t")) == 1  # type: ignore[arg-type]


def test_a_run_is_sent_as_far_as_there_is_room(redis: Redis, limits: TenantLimits) -> None:
    def ask(first: int, count: int, run: str = "r") -> tuple[int, str]:
        found = limits.admit_of_run("t", run, first, ids(count), most_open=10, most_work=150)
        return found.jobs, found.stopped

    assert ask(0, 20) == (10, "queued")
    redis.hset(run_key("r"), mapping={"fed": 10, "ended": 0})
    assert ask(10, 5) == (0, "queued")
    # A feeder that was killed before it sent them asks again, and they are not counted twice.
    assert ask(0, 20) == (10, "queued")
    assert admit(limits, ids(1)) == 0
    redis.hset(run_key("r"), "ended", 4)
    assert ask(10, 20) == (4, "queued")
    redis.hset(run_key("r"), mapping={"fed": 14, "ended": 14})
    assert ask(14, 20) == (1, "day")
    redis.hset(run_key("r"), mapping={"fed": 15, "ended": 15, "total": 15})
    # A run that is over, cancelled or gone has nothing open.
    assert admit(limits, ids(10)) == 10


@pytest.mark.parametrize("how", ["cancelled", "gone"])
def test_a_run_that_ends_early_gives_back_what_it_has_open(
    redis: Redis, limits: TenantLimits, how: str
) -> None:
    redis.hset(run_key("r"), mapping={"fed": 10, "ended": 0})
    assert limits.admit_of_run("t", "r", 0, ids(10), most_open=10, most_work=None).jobs == 10
    assert admit(limits, ids(1)) == 0
    redis.hset(run_key("r"), "cancelled", 1) if how == "cancelled" else redis.delete(run_key("r"))
    assert admit(limits, ids(10)) == 10


def test_limits_hold_while_several_servers_ask_at_once(valkey: ValkeyProcess) -> None:
    def server(number: int) -> int:
        with connect(valkey.url, 1) as client:
            own = TenantLimits(client, 1_000)
            asked = [
                own.admit("t", ids(2, 100 * number + 2 * each), most_open=15, most_work=150)
                for each in range(20)
            ]
            assert all(found.jobs in (0, 2) for found in asked)
            return sum(found.jobs for found in asked)

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(server, range(8))) == 14


def test_many_open_jobs_are_looked_at_once_a_second(redis: Redis, limits: TenantLimits) -> None:
    many = ids(2_000)
    with redis.pipeline(transaction=False) as pipe:
        for job_id, _ in many:
            pipe.hset(job_key(job_id), "state", "queued")
        pipe.execute()
    assert admit(limits, many, most=2_000) == 2_000
    look_now(redis)
    redis.config_resetstat()
    for _ in range(50):
        assert admit(limits, ids(1, 5_000), most=2_000) == 0
    calls = redis.info("commandstats")["cmdstat_hmget"]["calls"]
    assert 2_000 <= calls <= 4_000


def test_jobs_that_wait_for_others_are_not_open_until_they_wait_no_longer(
    redis: Redis, limits: TenantLimits
) -> None:
    [parent] = ids(1, 900)
    put(redis, [parent], "running")
    children = ids(8)

    def admit_children(jobs: list[tuple[str, int]], most: int) -> int:
        parents = [parent[0]] * len(jobs)
        return limits.admit("t", jobs, most_open=most, most_work=None, parents=parents).jobs

    assert admit_children(children, 8) == 8
    for job_id, _ in children:
        redis.hset(job_key(job_id), mapping={"state": "queued", "waits_for": parent[0]})
    assert admit(limits, ids(8, 100), 8) == 8
    put(redis, ids(8, 100), "queued")
    # They have a limit of their own, as high.
    assert admit_children(ids(1, 50), 8) == 0
    put(redis, ids(8, 100), "done")
    look_now(redis)
    for job_id, _ in children:
        redis.hdel(job_key(job_id), "waits_for")
    redis.zadd(f"{HTTP_OPEN}t:waiting", dict.fromkeys((job_id for job_id, _ in children), 0))
    assert admit(limits, ids(1, 200), 8) == 0
    assert redis.zcard(f"{HTTP_OPEN}t") == 8
    assert not redis.exists(f"{HTTP_OPEN}t:waiting")
    # Its parent is done: it is open at once.
    put(redis, [parent], "done")
    assert admit_children(ids(1, 50), 8) == 0
    assert admit_children(ids(1, 50), 9) == 1
    assert redis.zcard(f"{HTTP_OPEN}t") == 9
