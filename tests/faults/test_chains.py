"""Jobs that wait for the pictures of other jobs, with real workers that die, fail and are cancelled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from producer import submit_job
from producer.client import JobHandle
from tests.faults import oracle
from tests.faults.harness import ROOT, Ground, wait_until
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
def test_lines_that_wait_are_rendered_once_whatever_is_killed(ground: Ground, tmp_path: Path) -> None:
    """The feeder, Redis, the worker of the job that they wait for, and theirs at each point of their way."""
    ground.two_that_may_die()
    file = tmp_path / "lines.csv"
    command = [sys.executable, "-m", "producer", "ingest", str(file)]
    with ground.holding() as hold:
        parent = submit_job(ground.job(f"{hold} die:after_done"))
        prompts = [ground.job(f"die:{point}").prompt for point in POINTS] + [ground.job().prompt] * 20
        lines = [f"{prompt},{seed},{parent.id},1" for seed, prompt in enumerate(prompts)]
        file.write_text("\n".join(["prompt,seed,image,strength", *lines, "a cat,7,,"]) + "\n")
        feeder = subprocess.Popen(command, env=ground.stack.environment, cwd=ROOT)
        try:
            wait_until("one is done, and the others wait", lambda: counts(ground) == (len(lines), 1), 60)
        finally:
            feeder.kill()
            feeder.wait()
        ground.stack.valkey.kill()
        ground.stack.valkey.start()
        assert counts(ground) == (len(lines), 1)
    done = subprocess.run(command, env=ground.stack.environment, cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 0
    found = [json.loads(line) for line in Path(f"{file}.manifest.jsonl").read_text().splitlines()]
    assert [line["state"] for line in found] == ["done"] * (len(lines) + 1)
    oracle.settle(ground, [parent.id, *(line["id"] for line in found)], timeout_s=60)


def counts(ground: Ground) -> tuple[int, int]:
    """Of the one run: lines that wait, and lines that have ended."""
    with ground.redis as client:
        [run] = client.zrange("smallcat:runs", 0, -1) or ["none"]
        waiting, ended = client.hmget(f"smallcat:run:{run}", "waiting", "ended")
    return int(waiting or 0), int(ended or 0)


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
