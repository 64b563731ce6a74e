"""Jobs that wait and jobs in flight are counted without a worker, whoever asks."""

from __future__ import annotations

import json
import math

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.worker.engine.fake_runner import SERVED
from worker.broker.transport import UNACKED
from worker.contract.queues import PARKED, list_of, parked_list_of, queues_of
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.keys import HELD, QUEUES, WAITING
from worker.state.queue_figures import Served, queue_figures
from worker.state.redis_client import connect


@pytest.fixture
def client(valkey: ValkeyProcess) -> Redis:
    return connect(valkey.url, retry_s=1)


def test_the_transport_holds_messages_where_they_are_counted() -> None:
    assert HELD == UNACKED


def test_jobs_are_counted_by_model_and_revision_with_and_without_workers(client: Redis) -> None:
    fleet = Fleet(client, 60)
    served = SERVED.model_copy(update={"name": "an/other model"})
    exact, open_to_all, default = queues_of(served)
    assert queue_figures(client, fleet) == ({}, {}, {}, {}, {}, {}, 0)

    client.sadd(QUEUES, exact, open_to_all, default)
    client.hset(WAITING, mapping={"a": "", "b": ""})
    client.lpush(list_of(exact, 0), "urgent")
    client.lpush(list_of(exact, 9), "first", "second")
    client.lpush(list_of(open_to_all, 5), "any")
    newer = parked_list_of(exact, 0, 2)
    client.lpush(newer, "newer")
    client.sadd(PARKED, newer)
    held = json.dumps([{"body": 'x", "smallcat.other"]' * 50}, "exchange", exact])
    client.hset(HELD, mapping={f"tag{number}": held for number in range(1_000)})
    # As the scripts write it.
    compact = json.dumps([{"body": "a, b"}, "exchange", exact], separators=(",", ":"))
    client.hset(HELD, mapping={f"other{number}": compact for number in range(200)})
    client.hset(HELD, "strange", "no JSON")

    slug = exact.removeprefix("smallcat.").partition("@")[0]
    unknown = queue_figures(client, fleet)
    assert unknown.chained == 2
    assert unknown.waiting[Served(slug, "f" * 16)] == 4
    assert unknown.in_flight[Served(slug, "f" * 16)] == 1_200
    assert unknown.waiting[Served("default", "")] == 0
    assert set(unknown.workers.values()) == {0}

    info = WorkerInfo(name="a", served=served, started_at=1, device="", attention="", max_rows=8, versions={})
    fleet.announce(info)
    named = Served("an/other model", "f" * 16)
    found = queue_figures(client, fleet)
    assert (found.waiting[named], found.in_flight[named], found.workers[named]) == (4, 1_200, 1)
    assert found.waiting[Served("an/other model", "")] == 1
    fleet.announce(info.model_copy(update={"paused": "the bucket refuses it"}))
    assert queue_figures(client, fleet).workers[named] == 0
    # Scaled to zero, its name is still known.
    fleet.withdraw("a")
    assert queue_figures(client, fleet).waiting[named] == 4


@pytest.mark.parametrize("at", [math.nan, math.inf, -math.inf, -1e308, 1e308, 0.0])
def test_a_time_that_cannot_be_right_is_no_wait(
    at: float, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Producers can write when a job was submitted; the oldest job whose time is right still counts."""
    own, open_to_all, _ = queues_of(SERVED)
    client.sadd(QUEUES, own, open_to_all)
    client.lpush(list_of(own, 0), "message")
    client.lpush(list_of(own, 9), "message")
    fleet = Fleet(client, 60)
    times = [at, fleet.now() - 5]
    monkeypatch.setattr("worker.state.queue_figures._submitted", lambda client, messages: iter(times))
    assert 4 <= max(queue_figures(client, fleet).oldest_s.values()) < 60
