"""Redis goes and comes back, or is full: workers stay up, and no job is lost."""

from __future__ import annotations

import os
import random
import time

import pytest

from producer import submit_job
from tests.faults import oracle
from tests.faults.harness import LEASE_S, Ground, wait_until
from worker.contract.errors import QueueError

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

#: Seconds that a stopping worker may take beyond its drain time (2 s here): 5 for the jobs, 5 for Redis.
BEYOND_DRAIN_S = 10.0
#: Seconds within which a worker consumes again.
AGAIN_S = 10.0


def restarts(ground: Ground, times: int) -> None:
    """Kill Redis again and again, while the worker is idle and while it is busy."""
    worker = ground.worker()
    slowest_s = 0.0
    for number in range(2 * times):
        if number % 2:
            busy = ground.submit(8, "sleep:1")
            ground.journal.wait_for("start", busy[:1])
        ground.stack.valkey.kill()
        ground.stack.valkey.start()
        slowest_s = max(slowest_s, ground.journal.wait_for("start", ground.submit(1)))
    oracle.settle(ground)
    assert worker.running
    print(f"{times} restarts of Redis idle, {times} busy: consuming again after {slowest_s:.1f} s at most")
    assert slowest_s < AGAIN_S
    oracle.no_slot_is_lost(ground, worker)


def test_a_worker_consumes_again_after_redis_was_restarted(ground: Ground) -> None:
    restarts(ground, 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_consumes_again_after_each_of_5_restarts(ground: Ground) -> None:
    restarts(ground, 5)


def rewinds(ground: Ground, times: int, seed: int) -> None:
    """Let Redis forget all that was written after some moment, again and again, while jobs are worked on.

    So it is with a replica that becomes the primary, and with a machine that loses its power. The moment is
    after the jobs were submitted.
    """
    chance = random.Random(seed)
    workers = [ground.worker() for _ in range(2)]
    forgotten = 0
    for _ in range(times):
        left = ground.journal.total("leave")
        ground.submit(10)
        ground.submit(4, "sleep:0.5")
        [log] = (ground.stack.valkey.folder / "appendonlydir").glob("*.incr.aof")
        submitted = log.stat().st_size
        ended = chance.randint(0, 12)
        wait_until("progress", lambda left=left, ended=ended: ground.journal.total("leave") >= left + ended)
        ground.stack.valkey.kill()
        size = log.stat().st_size
        os.truncate(log, chance.randint(submitted, size))
        forgotten += size - log.stat().st_size
        ground.stack.valkey.start()
    found = oracle.settle(ground, timeout_s=90)
    assert all(worker.running for worker in workers)
    assert not any("Traceback" in worker.output() for worker in workers)
    again = sum(worker.output().count("Redis has lost the record") for worker in workers)
    print(
        f"{times} times forgotten, {forgotten} bytes, {len(ground.ids)} jobs: 0 lost, "
        f"{found.renders_over} rendered again, {again} not acknowledged"
    )


def test_no_job_is_lost_with_what_redis_forgets_of_it(ground: Ground) -> None:
    rewinds(ground, 3, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_job_is_lost_with_what_redis_forgets_of_it_40_times(ground: Ground) -> None:
    rewinds(ground, 40, seed=1)


def test_a_full_redis_refuses_jobs_and_its_workers_drain_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs in flight and jobs in the queue are done while Redis takes nothing new, which makes room."""
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    worker = ground.worker(settings={"SMALLCAT_MAX_ATTEMPTS": "1"})
    with ground.holding() as hold:
        ids = ground.submit(20, hold)
        ground.journal.wait_for("start", ids[:8])
        with ground.redis as client:
            client.config_set("maxmemory", 1)
        with pytest.raises(QueueError, match=r"is full .*: wait for workers to drain it"):
            submit_job(ground.job())
    found = oracle.settle(ground)
    assert found.renders_over == 0
    assert worker.running
    with ground.redis as client:
        client.config_set("maxmemory", 0)
    ground.submit(1)
    oracle.settle(ground)
    assert worker.running
    assert not ground.redis.exists("smallcat:undecodable")
    oracle.no_slot_is_lost(ground, worker)


def test_a_redis_that_takes_no_writes_costs_no_attempt(ground: Ground) -> None:
    """A primary that became a replica, until it is one again: jobs end then, and at their first try."""
    worker = ground.worker(settings={"SMALLCAT_MAX_ATTEMPTS": "1"})
    with ground.holding() as hold:
        ids = ground.submit(20, hold)
        ground.journal.wait_for("start", ids[:8])
        with ground.redis as client:
            client.replicaof("127.0.0.1", "1")
    ground.journal.wait_for("put", ids[:8])
    # Longer than a lease: nobody can renew one, and nobody can take a job away.
    began_s = time.monotonic()
    wait_until("past the lease", lambda: time.monotonic() > began_s + 1.5 * LEASE_S)
    assert ground.journal.total("leave") == 0
    with ground.redis as client:
        client.replicaof("NO", "ONE")
    found = oracle.settle(ground)
    assert found.renders_over == 0
    assert worker.running
    oracle.no_slot_is_lost(ground, worker)


def test_a_worker_stops_in_time_although_redis_is_away(ground: Ground) -> None:
    """With pictures in the bucket whose done marks nobody takes: they are not rendered again."""
    worker = ground.worker()
    with ground.holding() as hold:
        ids = ground.submit(8, hold)
        ground.journal.wait_for("start", ids)
        ground.stack.valkey.kill()
    ground.journal.wait_for("put", ids)
    began_s = time.monotonic()
    worker.ask_to_end()
    assert worker.wait(60)
    took_s = time.monotonic() - began_s
    ground.stack.valkey.start()
    worker.start()
    found = oracle.settle(ground)
    assert found.renders_over == 0
    print(f"stopped after {took_s:.1f} s although Redis was away, drain 2 s")
    assert took_s < 2 + BEYOND_DRAIN_S
