"""Storms: workers are killed, stopped and restarted while jobs come in. No job may be lost.

The short forms run in `make test`, the long ones by `make storm`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from producer import submit_job
from tests.faults import oracle
from tests.faults.harness import LEASE_S, TENANTS, FaultWorker, Ground, chaining, wait_until
from tests.faults.pictures import IN_TURNS, KINDS
from worker.contract.job import Job

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

#: A storm kills the same job more often than a poison job would be tried.
PATIENT = {"SMALLCAT_MAX_ATTEMPTS": "1000"}
#: SIGKILLs of a long storm, and jobs between two of them: a worker that starts takes a core from the others.
KILLS, JOBS_BETWEEN = int(os.environ.get("STORM_KILLS", "200")), 200
#: Jobs a second that a long storm submits.
RATE = 150.0
#: Seconds that a stopping worker may take beyond its drain time (2 s here).
BEYOND_DRAIN_S = 5.0


def storm(
    ground: Ground,
    kills: int,
    rate: float,
    between: int = 20,
    tenants: Sequence[str] = TENANTS,
    submit: Callable[[Job], str] = lambda job: submit_job(job).id,
    kinds: Sequence[str] = ("text",),
    **faults: object,
) -> float:
    """Kill one of two workers again and again, under load, each time after `between` more jobs.

    Returns the jobs a second whose pictures were put, from the first kill's wait to the last kill.
    """
    workers = [ground.worker(ready=False, settings=PATIENT, **faults) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    began_s = time.monotonic()
    with ground.feeding(rate, submit=submit, tenants=tenants, kinds=kinds) as feeder:
        for kill in range(kills):
            victim = workers[kill % 2]
            victim.wait_ready()
            left = ground.journal.total("leave")
            wait_until("progress", lambda left=left: ground.journal.total("leave") > left + between, 120)
            victim.kill()
            victim.launch()
        took_s, done = time.monotonic() - began_s, len(ground.journal.count("put"))
    pace = done / took_s
    print(f"{kills} kills in {took_s:.0f} s, {done} of {len(feeder.ids)} jobs done: {pace:.0f} jobs/s")
    for worker in workers:
        worker.wait_ready()
    return pace


def of_all_kinds() -> dict[str, Any]:
    """Of 16 jobs three begin with a picture, and two with another job's."""
    return {"kinds": IN_TURNS, "submit": chaining(8)}


def test_sigkills_lose_no_job(ground: Ground) -> None:
    storm(ground, kills=3, rate=30.0, **of_all_kinds())
    oracle.settle(ground)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_sigkills_lose_no_job(ground: Ground) -> None:
    """At 100 jobs a second and more, downtime included. Into a folder: the bucket's server takes a core."""
    pace = storm(ground, KILLS, rate=RATE, between=JOBS_BETWEEN, storage="folder", **of_all_kinds())
    found = oracle.settle(ground, timeout_s=300)
    print(f"lost {len(found.lost)}, marked twice {found.marks_over}, rendered again {found.renders_over}")
    assert pace >= 100
    oracle.no_slot_is_lost(ground, *ground.workers)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sigkills_lose_no_job_on_a_real_bucket(ground: Ground) -> None:
    storm(ground, KILLS // 4, rate=120.0, **of_all_kinds())
    found = oracle.settle(ground, timeout_s=300)
    print(f"lost {len(found.lost)}, marked twice {found.marks_over}, rendered again {found.renders_over}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_storm_on_kombus_own_transport_loses_some(ground: Ground) -> None:
    """The negative control: this suite can fail. That transport knows no tenants."""
    stock: dict[str, Any] = {"storage": "folder", "transport": "stock", "tenants": ("",)}
    storm(ground, KILLS, rate=RATE, between=JOBS_BETWEEN, **stock)
    wait_until("drained", lambda: ground.queued() == 0 and ground.unsettled() == 0, 300)
    found = oracle.account(ground, ground.ids)
    print(f"lost {len(found.lost)}, marked twice {found.marks_over}, rendered again {found.renders_over}")
    assert found.lost


def restarts(ground: Ground, times: int, rate: float) -> None:
    """Restart one of two workers in order, again and again: 0 lost, 0 twice."""
    workers = [ground.worker(ready=False) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    exits_s = []
    with ground.feeding(rate):
        for number in range(times):
            victim = workers[number % 2]
            victim.wait_ready()
            began_s = time.monotonic()
            victim.ask_to_end()
            assert victim.wait(30)
            exits_s.append(time.monotonic() - began_s)
            victim.launch()
    workers[0].wait_ready()
    found = oracle.settle(ground)
    print(f"{times} restarts, {len(ground.ids)} jobs: exit after {max(exits_s):.1f} s at most")
    assert max(exits_s) < 2 + BEYOND_DRAIN_S
    assert found.renders_over == 0


def test_restarts_lose_and_double_no_job(ground: Ground) -> None:
    restarts(ground, 2, rate=20.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_30_restarts_lose_and_double_no_job(ground: Ground) -> None:
    restarts(ground, 30, rate=30.0)


def test_a_stopping_worker_gives_back_what_it_cannot_finish(ground: Ground) -> None:
    worker = ground.worker()
    with ground.holding() as hold:
        ids = ground.submit(8, hold)
        ground.journal.wait_for("start", ids)
        began_s = time.monotonic()
        worker.ask_to_end()
        assert worker.wait(30)
        assert 2 <= time.monotonic() - began_s < 2 + BEYOND_DRAIN_S
        assert ground.unsettled() == 0
        assert ground.queued() == 8
    worker.start()
    oracle.settle(ground)


def faults_of(ground: Ground, chance: random.Random) -> dict[str, Callable[[], None]]:
    """What may befall a storm's workers and its Redis, by name."""

    def one() -> FaultWorker:
        return chance.choice(ground.workers)

    def kill() -> None:
        victim = one()
        victim.kill()
        victim.launch()

    def restart() -> None:
        victim = one()
        victim.ask_to_end()
        assert victim.wait(30)
        victim.launch()

    def pause() -> None:
        victim = one()
        victim.pause()
        try:
            taken = ground.journal.total("leave")
            others = lambda: ground.journal.total("leave") > taken + 30  # noqa: E731 - read once
            began_s = time.monotonic()
            wait_until("past the lease", lambda: others() and time.monotonic() > began_s + 1.5 * LEASE_S)
        finally:
            victim.resume()

    def kill_redis() -> None:
        ground.stack.valkey.kill()
        ground.stack.valkey.start()

    def freeze_redis() -> None:
        ground.stack.valkey.pause()
        try:
            time.sleep(chance.uniform(0.5, 1.5) * LEASE_S)  # The fault itself.
        finally:
            ground.stack.valkey.resume()

    def kill_storage() -> None:
        ground.stack.s3.kill()
        ground.stack.s3.start()

    return {
        "kill": kill,
        "restart": restart,
        "pause": pause,
        "cut connections": ground.cut_connections,
        "kill redis": kill_redis,
        "freeze redis": freeze_redis,
        "kill storage": kill_storage,
    }


def mixed(ground: Ground, seed: int, workers: int, count: int, rate: float) -> None:
    """`count` faults of all kinds, one after the other, under load: 0 lost."""
    chance = random.Random(seed)
    started = [ground.worker(ready=False, settings=PATIENT) for _ in range(workers)]
    for worker in started:
        worker.wait_ready()
    faults = faults_of(ground, chance)
    deck = [name for _ in range(count // len(faults) + 1) for name in faults][:count]
    chance.shuffle(deck)
    with ground.feeding(rate, kinds=KINDS, submit=chaining(3)) as feeder:
        for name in deck:
            for worker in started:
                worker.wait_ready()
            left = ground.journal.total("leave")
            faults[name]()
            wait_until(
                f"progress after {name}",
                lambda left=left: ground.journal.total("leave") > left + 10,
                60,
            )
    found = oracle.settle(ground, timeout_s=300)
    print(
        f"seed {seed}: {count} faults, {workers} workers, {len(ground.ids)} jobs: lost {len(found.lost)}, "
        f"marked twice {found.marks_over}, rendered again {found.renders_over}; "
        f"the producer was refused {feeder.refused} times"
    )


def test_a_storm_of_all_faults_loses_no_job(ground: Ground) -> None:
    mixed(ground, seed=0, workers=2, count=4, rate=15.0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_40_faults_of_all_kinds_lose_no_job(ground: Ground, seed: int) -> None:
    mixed(ground, seed=seed, workers=3, count=40, rate=25.0)
    oracle.no_slot_is_lost(ground, *ground.workers)
