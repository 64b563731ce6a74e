"""No slot stays empty: a free one is filled within 20 ms, and a fake engine is always busy."""

from __future__ import annotations

import itertools
import statistics
import threading

import pytest
from celery.events import EventReceiver
from kombu import Connection

from tests.faults import oracle
from tests.faults.harness import Ground, slots, wait_until
from worker.celery import app

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)


def refill(ground: Ground, jobs: int) -> tuple[float, float]:
    """A few slots and many jobs: ms from the end of one to the start of the next, median and p95."""
    ground.worker(rows=1)
    with ground.holding() as hold:
        held = ground.submit(slots(1), hold)
        ground.journal.wait_for("take", held)
        ground.submit(jobs)
    oracle.settle(ground)
    events = [each for each in ground.journal.events() if each.what in ("take", "leave")]
    full = events[slots(1) : -slots(1)]  # While jobs were waiting.
    gaps_ms = sorted(
        1000 * (later.at_s - each.at_s)
        for each, later in itertools.pairwise(full)
        if (each.what, later.what) == ("leave", "take")
    )
    median_ms, late_ms = statistics.median(gaps_ms), gaps_ms[int(len(gaps_ms) * 0.95)]
    print(f"refill of a free slot, {jobs} jobs: median {median_ms:.1f} ms, p95 {late_ms:.1f} ms")
    return median_ms, late_ms


def test_a_free_slot_is_filled_at_once(ground: Ground) -> None:
    median_ms, _ = refill(ground, 60)
    assert median_ms < 20


@pytest.mark.slow
def test_a_free_slot_is_filled_within_20_ms(ground: Ground) -> None:
    _, late_ms = refill(ground, 500)
    assert late_ms < 20


def busy(ground: Ground, jobs: int, step_s: float) -> float:
    """The part of the time that the engine spent in steps, while jobs were waiting."""
    ground.worker(rows=4, step_s=step_s, journal_steps=1)
    ids = ground.submit(jobs, steps=8)
    wait_until("all done", lambda: ground.states(ids).keys() == {"done"}, 120)
    steps = [each.at_s for each in ground.journal.events() if each.what == "step"]
    stops = [each.at_s for each in ground.journal.events() if each.what == "stepped"]
    # Neither the first jobs, which come alone, nor the last, which leave slots empty.
    window = slice(len(steps) // 10, -len(steps) // 10)
    began, ended = steps[window], stops[window]
    spent_s = sum(stop - start for start, stop in zip(began, ended, strict=True))
    share = spent_s / (ended[-1] - began[0])
    print(f"{jobs} jobs of 8 steps of {1000 * step_s:g} ms: the engine was busy {share:.1%} of the time")
    oracle.settle(ground)
    return share


def test_the_engine_is_busy_while_there_is_work(ground: Ground) -> None:
    assert busy(ground, 60, step_s=0.04) > 0.85


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_engine_is_busy_at_least_95_percent(ground: Ground) -> None:
    assert busy(ground, 400, step_s=0.04) >= 0.95


def test_flower_receives_the_events_of_every_job(ground: Ground) -> None:
    """Events go in batches; none is missing, also after a connection was lost. Received as Flower does."""
    ground.worker()
    received: set[str] = set()
    ready = threading.Event()
    with Connection(ground.stack.valkey.url) as connection:
        receiver = EventReceiver(
            connection, {"task-succeeded": lambda event: received.add(event["uuid"][:32])}, app=app
        )
        receiver.on_consume_ready = lambda *_, **__: ready.set()
        listener = threading.Thread(target=lambda: receiver.capture(timeout=None, wakeup=False), daemon=True)
        listener.start()
        assert ready.wait(30)
        for _ in range(2):
            ids = set(ground.submit(20))
            wait_until("all received", lambda ids=ids: ids <= received)
            with ground.redis as client:
                client.client_kill_filter(_type="normal", skipme=True)
        receiver.should_stop = True
        ground.submit(1)
        listener.join(30)
        assert not listener.is_alive()
    oracle.settle(ground)
