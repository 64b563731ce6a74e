"""What tenants have used, in a real Valkey: each picture counts once."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import pytest
from redis.client import Redis

from deploy.embedded.servers import ValkeyProcess
from worker.contract.errors import CallerError, RenderError
from worker.contract.job import Job
from worker.contract.record import JobRecord, State
from worker.state.keys import USAGE
from worker.state.records import Records
from worker.state.redis_client import connect
from worker.state.usage import KEPT_DAYS, Usage, Used, day_of, read_usage

TODAY = datetime.datetime.now(datetime.UTC).date()


@pytest.fixture
def redis(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, 1) as client:
        yield client


@pytest.fixture
def records(redis: Redis) -> Records:
    return Records(redis, 1_000)


def job(tenant: str = "acme", seed: int = 1) -> Job:
    return Job(prompt="a cat", seed=seed, revision="r", tenant=tenant)


def done(records: Records, one: Job, used: Used | None) -> bool:
    return records.done(JobRecord(id=one.id, state=State.DONE, job=one, uri="s3://b/x.png"), used=used)


def counted(redis: Redis, tenant: str | None = None) -> list[Usage]:
    # A test may run over midnight.
    return read_usage(redis, TODAY, TODAY + datetime.timedelta(1), tenant)


MADE = Used(device_s=1.25, size=1_000)


def test_a_picture_counts_once_however_often_it_is_marked_done(redis: Redis, records: Records) -> None:
    records.submitted(job(), "q")
    assert [done(records, job(), MADE) for _ in range(3)] == [True, False, False]
    # Sent again, it is in the bucket, and counted apart.
    records.submitted(job(), "q")
    assert done(records, job(), Used(is_cached=True))
    records.submitted(job(seed=2), "q")
    assert done(records, job(seed=2), MADE)
    [row] = counted(redis)
    assert row[1:] == ("acme", 2, 1, 2.5, 2_000)
    assert counted(redis, "acme") == [row]
    assert counted(redis, "other") == []
    [key] = redis.keys(f"{USAGE}*")
    assert 0 < redis.ttl(key) <= KEPT_DAYS * 86_400


def test_what_did_not_become_a_picture_is_not_counted(redis: Redis, records: Records) -> None:
    for seed, end in ((1, "cancelled"), (2, "failed")):
        one = job(seed=seed)
        records.submitted(one, "q", "s")
        if end == "cancelled":
            records.cancel(one.id)
            assert not done(records, one, MADE)
        else:
            records.claim(one, "m", worker="w", lease_s=9, max_attempts=3, queue="q")
            assert records.failed(one.id, "m", RenderError("no"))
    assert counted(redis) == []


def test_without_a_tenant_nothing_is_counted_and_nothing_costs_more(redis: Redis, records: Records) -> None:
    def counts(tenant: str) -> int:
        one = job(tenant)
        records.submitted(one, "q")
        redis.config_resetstat()
        done(records, one, MADE)
        stats = redis.info("commandstats")
        return int(stats.get("cmdstat_hincrby", {"calls": 0})["calls"])

    assert counts("") == 0
    assert redis.keys(f"{USAGE}*") == []
    assert counts("acme") == 3


def test_tenants_and_days_are_apart(redis: Redis, records: Records) -> None:
    for tenant in ("acme", "evil"):
        one = job(tenant)
        records.submitted(one, "q")
        done(records, one, MADE)
    yesterday = TODAY - datetime.timedelta(1)
    redis.hset(f"{USAGE}{(yesterday - datetime.date(1970, 1, 1)).days}", "acme:images", 7)
    found = read_usage(redis, yesterday, TODAY + datetime.timedelta(1))
    assert [(row.tenant, row.images) for row in found] == [("acme", 7), ("acme", 1), ("evil", 1)]
    assert found[0].day == yesterday.isoformat()


@pytest.mark.parametrize("days", [0, KEPT_DAYS + 1])
def test_periods_have_limits(redis: Redis, days: int) -> None:
    with pytest.raises(CallerError, match="ask for 1 to 400"):
        read_usage(redis, TODAY - datetime.timedelta(days - 1), TODAY)


def test_a_day_is_written_as_iso_has_it() -> None:
    assert day_of("2026-11-28", "since") == datetime.date(2026, 11, 28)
    with pytest.raises(CallerError, match="since is 'tomorrow': write a day as 2026-11-28"):
        day_of("tomorrow", "since")
