"""Jobs that wait for the pictures of other jobs, with real workers that die, fail and are cancelled."""

from __future__ import annotations

import pytest

from producer import submit_job
from producer.client import JobHandle
from tests.faults import oracle
from tests.faults.harness import Ground, wait_until
from tests.faults.test_crash_points import POINTS
from worker.contract.errors import InputError
from worker.contract.record import State

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)


def chain(ground: Ground, *verbs: str) -> list[JobHandle]:
    """Jobs that each begin with the picture of the one before."""
    handles: list[JobHandle] = []
    for each in verbs:
        job = ground.job(each)
        handles.append(submit_job(job, image=handles[-1], strength=1.0) if handles else submit_job(job))
    return handles


@pytest.mark.services
def test_a_chain_is_rendered_in_its_order_whatever_kills_the_workers(ground: Ground) -> None:
    """At each point of the parent's way, and of the child's; and a worker of its own for those who wait."""
    ground.two_that_may_die()
    with ground.holding() as hold:
        # All are submitted before the first one ends.
        chains = [chain(ground, f"{hold} die:{point}", f"die:{point}", "") for point in POINTS[:1]]
        assert {each[1].state() for each in chains} == {State.WAITING}
    for point in POINTS[1:]:
        oracle.settle(ground, [handle.id for handles in chains for handle in handles], timeout_s=60)
        chains.append(chain(ground, f"die:{point}", f"die:{point}", ""))
    ids = [handle.id for handles in chains for handle in handles]
    oracle.settle(ground, ids, timeout_s=120)
    ends = [event.job for event in ground.journal.events() if event.what == "start"]
    for handles in chains:
        firsts = [ends.index(handle.id) for handle in handles]
        assert firsts == sorted(firsts)


def test_children_fail_with_their_parent_and_slots_stay_free(calm: Ground) -> None:
    with calm.holding() as hold:
        parent, child, grandchild = chain(calm, f"{hold} nan:", "", "")
        cancelled, of_cancelled = chain(calm, hold, "")
        calm.journal.wait_for("start", [parent.id, cancelled.id])
        # Those that wait take no slot.
        calm.journal.wait_for("end", calm.submit(4))
        assert {child.state(), grandchild.state(), of_cancelled.state()} == {State.WAITING}
        cancelled.cancel()
        with pytest.raises(InputError, match=f"job {cancelled.id}, which was cancelled. Submit that job"):
            of_cancelled.result(30)
    for handle in (child, grandchild):
        with pytest.raises(InputError, match=f"job {parent.id}"):
            handle.result(30)
    assert not set(calm.journal.count("start")) & {child.id, grandchild.id, of_cancelled.id}
    oracle.settled(calm)
    oracle.keys_have_owners(calm)
    oracle.no_slot_is_lost(calm, *calm.workers)


@pytest.mark.services
def test_a_chain_outlives_redis(ground: Ground) -> None:
    with ground.holding() as hold:
        handles = chain(ground, hold, "", "")
        ground.stack.valkey.kill()
        ground.stack.valkey.start()
        ground.worker()
        wait_until("the parent begins", lambda: handles[0].state() is State.RUNNING)
        assert handles[2].state() is State.WAITING
    oracle.settle(ground, [handle.id for handle in handles])
