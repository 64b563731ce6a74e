"""Our workers are killed beside a stock Celery app on the same database: neither loses or doubles a task."""

from __future__ import annotations

import pytest

from tests.faults import oracle
from tests.faults.harness import Ground, wait_until
from tests.faults.test_storms import storm
from tests.integration.test_neighbours import Neighbour

#: Tasks of each neighbour; each takes longer than half of our lease.
TASKS = 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_neighbours_run_their_tasks_once_while_our_workers_are_killed(ground: Ground) -> None:
    """With Celery's defaults, with acks_late, and with a visibility timeout of ten seconds."""
    neighbours = [
        Neighbour(ground, "plain"),
        Neighbour(ground, "late", late="1"),
        Neighbour(ground, "short", late="1", timeout_s="10"),
    ]
    try:
        for each in neighbours:
            each.send(TASKS)
        storm(ground, kills=20, rate=30.0, between=40)
        for each in neighbours:
            wait_until(f"{each.name}'s tasks", lambda each=each: len(each.runs()) >= 2 * TASKS, 300)
        found = oracle.settle(ground, timeout_s=120)
        once = sorted(f"{what} {number}" for what in ("start", "end") for number in range(TASKS))
        assert [each.name for each in neighbours if sorted(each.runs()) != once] == []
    finally:
        for each in neighbours:
            each.stop()
    print(f"{3 * TASKS} tasks of neighbours once; ours: {len(ground.ids)}, lost {len(found.lost)}")
