"""A worker that dies at each point of a job's way leaves one object and one done mark."""

from __future__ import annotations

import pytest

from producer import JobHandle, submit_job
from tests.faults import oracle
from tests.faults.harness import Ground
from worker.contract.record import State

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

#: Where `tests.faults.app` can die, in the order in which a job passes.
POINTS = ("between_puts", "after_put", "after_done", "before_ack")


def test_death_at_every_point_leaves_one_object_and_one_mark(ground: Ground) -> None:
    ground.two_that_may_die()
    dying: list[str] = []
    for point in POINTS:
        with ground.holding() as hold:
            dying += ground.submit(1, f"{hold} die:{point}")
            # One that waits for its picture is released, once.
            child = submit_job(ground.job(), image=JobHandle(dying[-1]))
            assert child.state() is State.WAITING
            ground.ids.append(child.id)
        # One at a time: a death takes the other jobs with it, one of which may be past its own point.
        oracle.settle(ground, timeout_s=60)
    # Nothing is kept of a first pass.
    [second] = ground.submit(1, "kill2:1", upscale=2)
    ground.submit(8)
    oracle.settle(ground, timeout_s=120)
    died = ground.journal.count("died")
    assert {job_id: died[job_id] for job_id in dying} == dict.fromkeys(dying, 1)
    way = [event.what for event in ground.journal.events() if event.job == second]
    assert [what for what in way if what in ("start", "first", "end")] == [*2 * ["start", "first"], "end"]
    # What lay in the bucket was not rendered again.
    for job_id in dying[1:]:
        way = [event.what for event in ground.journal.events() if event.job == job_id]
        assert "start" not in way[way.index("died") :]
