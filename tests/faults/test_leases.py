"""Leases: a dead worker's jobs go on soon, a living one's never run twice, whatever happens to Redis."""

from __future__ import annotations

import time

import pytest

from tests.faults import oracle
from tests.faults.harness import LEASE_S, Ground, wait_until

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)


def take_over(ground: Ground, lease_s: float, within_s: float = 30, **faults: object) -> float:
    """Kill a worker with 20 jobs in flight; seconds until another one has started them all."""
    settings = {"SMALLCAT_LEASE_S": str(lease_s)}
    first = ground.worker(rows=10, settings=settings, **faults)
    with ground.holding() as hold:
        ids = ground.submit(20, hold)
        ground.journal.wait_for("start", ids)
        second = ground.worker(rows=10, settings=settings, **faults)
        first.kill()
        wanted = dict.fromkeys(ids, 2)
        took_s = wait_until(
            "all restarted", lambda: ground.journal.count("start") == wanted, lease_s + within_s
        )
    assert second.running
    oracle.settle(ground)
    print(f"kill -9 with 20 unacknowledged, lease {lease_s:g} s: all restarted after {took_s:.1f} s")
    return took_s


def test_a_killed_worker_s_jobs_are_taken_over_within_the_lease(ground: Ground) -> None:
    # A quarter of the lease, at most 5 s, until somebody looks, and room for a busy machine.
    assert take_over(ground, LEASE_S) < 1.25 * LEASE_S + 5


@pytest.mark.slow
def test_20_jobs_of_a_killed_worker_are_restarted_within_14_s(ground: Ground) -> None:
    assert take_over(ground, 10.0) < 14


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_20_jobs_of_a_killed_worker_wait_longer_on_kombus_own_transport(ground: Ground) -> None:
    """A negative control: this suite can fail."""
    assert take_over(ground, 10.0, within_s=200, transport="stock") > 14


def befall(ground: Ground, fault: str, lease_s: float, away_s: float, frozen_s: float) -> None:
    """Let the fault happen, once."""
    valkey = ground.stack.valkey
    if fault == "connections cut":
        ground.cut_connections()
    elif fault == "redis killed":
        valkey.kill()
        time.sleep(away_s)  # The fault itself.
        valkey.start()
    elif fault == "redis frozen":
        valkey.pause()
        time.sleep(frozen_s)  # The fault itself.
        valkey.resume()


def long_jobs(
    ground: Ground, faults: list[str], lease_s: float, away_s: float, frozen_s: float, **control: object
) -> int:
    """Jobs of 1.5 leases under each fault; how many were rendered twice."""
    settings = {"SMALLCAT_LEASE_S": str(lease_s)}
    twice = 0
    workers = [ground.worker(ready=False, settings=settings, **control) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    for fault in faults:
        # A job that ended while Redis was frozen would not be held when its lease runs out.
        seconds = max(1.5 * lease_s, frozen_s + 1 if fault == "redis frozen" else 0)
        ids = ground.submit(6, f"sleep:{seconds}")
        ground.journal.wait_for("start", ids)
        befall(ground, fault, lease_s, away_s, frozen_s)
        found = oracle.settle(ground, ids)
        twice += found.renders_over
        print(f"6 jobs of {seconds:g} s, lease {lease_s:g} s, {fault}: {found.renders_over} twice")
    assert all(worker.running for worker in workers)
    if not control:  # kombu's own transport may lose some.
        oracle.no_slot_is_lost(ground, *workers)
    return twice


FAULTS = ["nothing", "connections cut", "redis killed", "redis frozen"]


def test_jobs_longer_than_the_lease_run_once(ground: Ground) -> None:
    assert long_jobs(ground, FAULTS[1:], LEASE_S, away_s=1.0, frozen_s=1.4 * LEASE_S) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_jobs_of_15_s_run_once_with_a_lease_of_10_s(ground: Ground) -> None:
    assert long_jobs(ground, FAULTS, 10.0, away_s=3.0, frozen_s=14.0) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_jobs_on_kombus_own_transport_run_twice(ground: Ground) -> None:
    """A negative control: this suite can fail."""
    assert long_jobs(ground, FAULTS[:2], 10.0, away_s=0, frozen_s=0, transport="stock") > 0


def test_a_worker_that_was_stopped_past_its_lease_does_no_harm(ground: Ground) -> None:
    first = ground.worker()
    with ground.holding() as hold:
        ids = ground.submit(4, hold)
        ground.journal.wait_for("start", ids)
        first.pause()
        second = ground.worker()
        wanted = dict.fromkeys(ids, 2)
        wait_until("taken over", lambda: ground.journal.count("start") == wanted)
        first.resume()
    # Not before: what the second one of them puts again is not whole in the folder for a moment.
    wait_until("both are done with each job", lambda: ground.journal.total("leave") == 8)
    oracle.settle(ground)
    assert first.running
    oracle.no_slot_is_lost(ground, first, second)


def test_a_worker_whose_clock_is_two_minutes_ahead_takes_nothing_early(ground: Ground) -> None:
    right = ground.worker(ready=False)
    ahead = ground.worker(ready=False, clock_s=120)
    right.wait_ready()
    ahead.wait_ready()
    # More than one of them takes at once.
    ids = ground.submit(14, f"sleep:{1.5 * LEASE_S}")
    found = oracle.settle(ground, ids)
    assert found.renders_over == 0
    assert {event.pid for event in ground.journal.events()} == {right.pid, ahead.pid}
