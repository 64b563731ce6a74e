"""Redis' primary is killed under load: sentinels promote its replica, and workers and producers go on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from deploy.embedded.stack import Stack
from producer import submit_job
from tests.faults import oracle
from tests.faults.harness import Ground, wait_until
from tests.sentinels import Sentinels
from worker.contract.errors import QueueError

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def watched(
    new_stack: Callable[..., Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ground]:
    """A ground whose Redis is a primary, a replica and three sentinels."""
    stack = new_stack(workers=0)
    stack.valkey.stop()
    group = Sentinels(stack.home).start()
    stack.valkey = group  # type: ignore[assignment]
    ground = Ground(stack, tmp_path)
    ground.use(monkeypatch)
    monkeypatch.setenv("SMALLCAT_WAIT_REPLICAS", "1")
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "30")
    yield ground
    for worker in ground.workers:
        worker.kill()
    group.stop()


def group_of(ground: Ground) -> Sentinels:
    group = ground.stack.valkey
    assert isinstance(group, Sentinels)
    return group


def fail_overs(ground: Ground, hows: Sequence[str], rate: float) -> None:
    """Fail over again and again while jobs are submitted and rendered."""
    workers = [ground.worker() for _ in range(2)]
    took_s = []
    with ground.feeding(rate=rate) as feeder:
        for how in (*hows, ""):
            done = len(ground.journal.count("leave"))
            wait_until("work", lambda done=done: len(ground.journal.count("leave")) > done + 2 * rate, 60)
            took_s += [group_of(ground).fail_over(how)] if how else []
    found = oracle.settle(ground, timeout_s=90)
    assert all(worker.running for worker in workers)
    assert not any("Traceback" in worker.output() for worker in workers)
    again = f"{found.renders_over} rendered again, {feeder.refused} refused"
    print(f"{len(hows)} failovers of {max(took_s):.1f} s at most, {len(ground.ids)} jobs: 0 lost, {again}")


# Not steady on a busy machine yet: see docs/reliability.md.
@pytest.mark.slow
def test_no_job_is_lost_with_the_primary_that_waited_for_a_replica(watched: Ground) -> None:
    fail_overs(watched, ["kill"], rate=20)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_job_is_lost_in_a_dozen_failovers(watched: Ground) -> None:
    """By death, by frost, and by order of the sentinels, with the old primary alive."""
    fail_overs(watched, 4 * ["kill", "freeze", "ask"], rate=40)


def test_a_submission_that_no_replica_confirms_is_an_error(
    watched: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    group = group_of(watched)
    next(node for node in group.nodes if node is not group.primary).kill()
    with pytest.raises(QueueError, match=r"0 of 1 replicas .*WAIT_REPLICAS.*submitting again"):
        submit_job(watched.job())
    monkeypatch.setenv("SMALLCAT_WAIT_REPLICAS", "0")
    assert submit_job(watched.job()).id


@pytest.mark.slow
def test_without_waiting_only_the_lag_is_lost(watched: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SMALLCAT_WAIT_REPLICAS: of all that was submitted, what the replica had not yet been sent."""
    monkeypatch.setenv("SMALLCAT_WAIT_REPLICAS", "0")
    group = group_of(watched)
    submitted: list[tuple[float, str]] = []
    ended = threading.Event()

    def submit() -> None:
        with contextlib.suppress(QueueError):
            while not ended.is_set():
                job_id = submit_job(watched.job()).id
                submitted.append((time.monotonic(), job_id))

    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until("submissions", lambda: len(submitted) > 300)
    killed_s = time.monotonic()
    group.fail_over()
    ended.set()
    for thread in threads:
        thread.join()
    before = [(at_s, job_id) for at_s, job_id in submitted if at_s < killed_s + 0.5]
    states = {job_id: watched.redis.exists(f"smallcat:job:{job_id}") for _, job_id in before}
    lost = [(at_s, job_id) for at_s, job_id in before if not states[job_id]]
    oldest_ms = max((1000 * (killed_s - at_s) for at_s, _ in lost), default=0.0)
    print(f"{len(before)} submitted, {len(lost)} lost, at most {oldest_ms:.0f} ms before the kill")
    # The replica is behind by what is on its way: milliseconds, and more where the machine is busy.
    assert oldest_ms < 250
    assert len(lost) < len(before) / 2
