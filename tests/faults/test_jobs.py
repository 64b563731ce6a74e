"""What a job can do to its worker: the next job runs, the others complete, and it fails."""

from __future__ import annotations

import pytest

from producer import JobHandle
from tests.faults import oracle
from tests.faults.harness import Ground, wait_until
from worker.contract.record import State

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

#: What the job's future ends with, by what its runner raised.
ERRORS = {
    "Exception": "RenderError",
    "SystemExit": "RenderError",
    "MemoryError": "RenderError",
    "OutOfMemoryError": "JobTooLargeError",
}


def fail(ground: Ground, count: int) -> None:
    """Give the worker `count` jobs that raise each kind, with good ones between them."""
    bad = {
        kind: [
            job_id
            for number in range(count)
            for job_id in ground.submit(1, f"raise:{kind}@{('prepare', 'step', 'decode')[number % 3]}")
        ]
        for kind in ERRORS
    }
    every_bad = {job_id for ids in bad.values() for job_id in ids}
    ground.ids = [job_id for job_id in ground.ids if job_id not in every_bad]
    ground.submit(10)
    oracle.settle(ground)
    wait_until("all failed", lambda: ground.states(every_bad).keys() == {"failed"})
    for kind, ids in bad.items():
        assert ground.error_types(ids) == {ERRORS[kind]: count}
    oracle.no_slot_is_lost(ground, *ground.workers)


def test_a_job_that_raises_takes_nothing_with_it(calm: Ground) -> None:
    fail(calm, 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_100_jobs_of_each_kind_that_raise_take_nothing_with_them(calm: Ground) -> None:
    fail(calm, 100)


def test_a_picture_that_is_not_finite_fails_alone(ground: Ground) -> None:
    # A worker of its own: one that ran out of memory runs smaller batches for good.
    ground.worker(settings={"SMALLCAT_MAX_ATTEMPTS": "1"})
    with ground.holding() as hold:
        others = ground.submit(3, hold)
        [bad] = ground.submit(1, "nan:")
        wait_until("failed", lambda: ground.states([bad]).keys() == {"failed"})
    assert ground.error_types([bad]) == {"NotFiniteError": 1}
    oracle.settle(ground, others)


@pytest.mark.parametrize("verb", ["kill:", pytest.param("break:", marks=pytest.mark.slow)])
def test_a_job_that_kills_its_process_is_set_aside_and_its_mates_complete(ground: Ground, verb: str) -> None:
    """Three tries, the last of them alone; those that ran with it are done in the end.

    So is one that breaks its worker's engine, after which the worker ends.
    """
    worker = ground.worker()
    ground.supervise(worker)
    with ground.holding() as hold:
        others = ground.submit(3, hold)  # One row is left.
        ground.journal.wait_for("start", others)
        [poison] = ground.submit(1, verb)
        wait_until("two deaths with others in flight", lambda: ground.journal.count("died")[poison] == 2, 60)
    wait_until("set aside", lambda: ground.states([poison]).keys() == {"failed"}, 60)
    oracle.settle(ground, others)
    record = JobHandle(poison).record()
    assert record.state is State.FAILED
    assert record.error_type == "PoisonJobError"
    assert [attempt.worker for attempt in record.tries] == [worker.node] * 3
    assert ground.journal.count("died")[poison] == 3
    for other in others:
        assert len(JobHandle(other).record().tries) <= 3
    oracle.no_slot_is_lost(ground, worker)


def test_a_lost_device_gives_its_jobs_to_another_worker_at_once(ground: Ground) -> None:
    """It costs none of them an attempt. The process leaves: what supervises it starts a new one."""
    # Far longer than a busy machine takes to do what is measured.
    lease_s = 20.0
    settings = {"SMALLCAT_LEASE_S": str(lease_s)}
    first = ground.worker(settings=settings)
    with ground.holding() as hold:
        others = ground.submit(3, hold)  # One row is left.
        ground.journal.wait_for("start", others)
        second = ground.worker(settings=settings)
        second.pause()  # So that it is the first one that takes the job.
        ids = [*others, *ground.submit(1, "lose:1")]
        ground.journal.wait_for("died", ids[-1:])
        second.resume()
        ground.journal.wait_for("end", ids[-1:])
        wait_until("all restarted", lambda: ground.journal.count("start") == dict.fromkeys(ids, 2))
    assert first.wait(30)
    assert "The engine failed, its jobs go back to the queue" in first.output()
    oracle.settle(ground, ids)
    assert [JobHandle(job_id).record().attempts for job_id in ids] == [1] * 4
    [lost] = [event.at_s for event in ground.journal.events() if event.what == "died"]
    again = [
        event.at_s - lost
        for event in ground.journal.events()
        if (event.what, event.pid) == ("start", second.pid)
    ]
    # A lease that was renewed a moment before would be up after three quarters of it.
    assert max(again) < 0.75 * lease_s
    print(f"a lost device: its 4 jobs were restarted elsewhere after {max(again):.1f} s")
    oracle.no_slot_is_lost(ground, second)
