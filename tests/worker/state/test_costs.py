"""What jobs cost Redis: commands, and what stays. `tests.benchmarks.fleet` and `.memory` measure fleets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.worker.engine.fake_runner import job_of
from worker.contract.job import Job
from worker.contract.record import JobRecord, State
from worker.state.keys import submission_key
from worker.state.records import Records
from worker.state.redis_client import connect
from worker.state.submissions import said

QUEUE, TTL_S = "smallcat.fake@ffff", 1_000
HELD = ("smallcat:unacked_index", "smallcat:unacked")
#: Commands of the three scripts that submit a job, claim it and mark it done, with those that run them. A
#: fetch has five more, and `submit_job` asks for the workers.
COMMANDS = 24


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def records(client: Redis) -> Records:
    return Records(client, TTL_S, held=HELD)


def commands(client: Redis) -> int:
    """How many there were, those of scripts included, but for those that ask."""
    stats: Any = client.info("commandstats")
    return sum(int(each["calls"]) for name, each in stats.items() if name != "cmdstat_info")


def live(records: Records, job: Job) -> None:
    """All that is written of a job which nothing disturbs."""
    message = f"{job.id}-1"
    records.submitted(job, QUEUE, "abcdef", message, "print", ("a list", "a message"))
    records.claim(job, f"{message}/tag", worker="w1", lease_s=30, max_attempts=3, queue=QUEUE)
    assert records.done(JobRecord(id=job.id, state=State.DONE, job=job, uri="s3://b/x.png"), "tag")


def test_a_job_s_life_has_few_commands(records: Records, client: Redis) -> None:
    live(records, job_of(0))  # Loads the scripts.
    before = commands(client)
    for number in range(64):
        live(records, job_of(number + 1))
    # What is done for one job of 16 is a part of that.
    assert (commands(client) - before) / 64 <= COMMANDS + 0.75


def test_the_list_of_what_was_drawn_last_is_in_order_and_expires(records: Records, client: Redis) -> None:
    jobs = [job_of(number) for number in range(40)]
    began = time.time()
    for job in jobs:
        live(records, job)
    found: Any = client.zrange("smallcat:drawn", 0, -1, withscores=True)
    assert [name for name, _ in found] == [job.id for job in jobs]
    assert all(began - 60 < at < time.time() + 60 for _, at in found)
    assert 0 < client.ttl("smallcat:drawn") <= TTL_S  # type: ignore[operator]


def test_a_list_that_was_deleted_expires_again_once_it_is_written_anew(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(client, TTL_S, held=HELD)
    live(records, job_of(1))
    client.delete("smallcat:drawn")
    now_s = time.monotonic()
    monkeypatch.setattr("worker.state.shared_scripts.time.monotonic", lambda: now_s + 61)
    live(records, job_of(2))
    assert 0 < client.ttl("smallcat:drawn") <= TTL_S  # type: ignore[operator]


def test_a_submission_has_what_is_its_own_and_is_not_at_its_default(records: Records, client: Redis) -> None:
    for number, metadata in enumerate(({}, {"whose": "mine"})):
        job = job_of(number, metadata=metadata)
        records.submitted(job, QUEUE, "abcdef")
        own = {"priority": job.priority, **({"metadata": metadata} if metadata else {})}
        assert client.get(submission_key(job.id, "abcdef")) == "+" + json.dumps(own, separators=(",", ":"))
        assert records.submission(job.id, "abcdef") == (own, False)
        assert records.get(job.id).with_own(own).job == job


def test_the_priority_is_said_in_any_case() -> None:
    """Earlier versions take a submission that says nothing for one that there never was."""
    assert said({"priority": 5, "metadata": {}}) == {"priority": 5}


def test_what_earlier_versions_wrote_of_a_submission_is_the_same(records: Records, client: Redis) -> None:
    job = job_of(1)
    records.submitted(job, QUEUE, "abcdef")
    client.set(submission_key(job.id, "abcdef"), '+{"priority":5,"metadata":{}}')
    own, given_up = records.submission(job.id, "abcdef")
    assert (own, given_up) == ({"priority": 5, "metadata": {}}, False)
    assert records.get(job.id).with_own(own).job == job
