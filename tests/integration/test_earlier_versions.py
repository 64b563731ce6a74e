"""Jobs of this version beside workers of earlier ones: what holds, and what docs/upgrades.md says does not.

An earlier worker knows nothing of submissions: it sees one job, and whether it was cancelled. What each
caller is told holds there, too.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.embedded.stack import Stack
from producer import JobCancelledError, JobHandle, State, submit_job
from tests.faults import oracle
from tests.faults.earlier import EARLIER
from tests.faults.harness import FaultWorker, Ground, wait_until
from tests.faults.releases import earlier_release
from worker.broker.transport import UNACKED
from worker.tracing.context import TraceContext
from worker.tracing.submissions import SentSpan

pytestmark = pytest.mark.services
SOON_S = 30.0


@pytest.fixture(scope="module", params=EARLIER)
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return earlier_release(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def ground(new_stack: Callable[..., Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    ground = Ground(new_stack(workers=0), tmp_path)
    ground.use(monkeypatch)
    return ground


@pytest.fixture
def earlier(ground: Ground, tree: Path) -> FaultWorker:
    return ground.worker(tree=tree)


def submitted(ground: Ground, verbs: str = "", **own: object) -> tuple[JobHandle, JobHandle]:
    """Two submissions of one job, with metadata of their own."""
    job = ground.job(verbs)
    one = submit_job(job, metadata={"of": "one"})
    other = submit_job(job, metadata={"of": "other"})
    ground.ids.append(job.id)
    return one, other


def test_each_submission_has_its_own_metadata_and_can_be_given_up_alone(
    ground: Ground, earlier: FaultWorker
) -> None:
    with ground.holding() as hold:
        one, other = submitted(ground, hold)
        ground.journal.wait_for("start", [one.id])
        assert one.cancel() is State.CANCELLED
        with pytest.raises(JobCancelledError):
            one.result(SOON_S)
        assert other.state() is State.RUNNING
    result = other.result(SOON_S)
    assert (result.state, result.job.metadata) == (State.DONE, {"of": "other"})
    assert one.state() is State.CANCELLED
    assert one.record().job.metadata == {"of": "one"}
    oracle.settle(ground)


def test_the_last_one_that_is_given_up_stops_the_render(ground: Ground, earlier: FaultWorker) -> None:
    with ground.holding() as hold:
        one, other = submitted(ground, hold)
        ground.journal.wait_for("start", [one.id])
        assert [one.cancel(), other.cancel()] == [State.CANCELLED, State.RUNNING]
        for handle in (one, other):
            with pytest.raises(JobCancelledError):
                handle.result(SOON_S)
        ground.journal.wait_for("leave", [one.id])
    oracle.settled(ground)
    assert ground.journal.count("put")[one.id] == 0


def test_a_queued_job_that_all_gave_up_is_never_rendered(ground: Ground, tree: Path) -> None:
    one, other = submitted(ground)
    assert [one.cancel(), other.cancel()] == [State.CANCELLED, State.CANCELLED]
    ground.worker(tree=tree)
    oracle.settled(ground)
    assert ground.journal.count("start")[one.id] == 0
    assert {one.state(), other.state()} == {State.CANCELLED}


def test_submitted_again_after_all_gave_it_up_it_is_rendered_and_the_old_submissions_stay_cancelled(
    ground: Ground, earlier: FaultWorker
) -> None:
    with ground.holding() as hold:
        one, other = submitted(ground, hold)
        ground.journal.wait_for("start", [one.id])
        one.cancel()
        other.cancel()
        with pytest.raises(JobCancelledError):
            other.result(SOON_S)
        again = submit_job(one.record().job, metadata={"of": "again"})
    result = again.result(SOON_S)
    assert (result.state, result.job.metadata) == (State.DONE, {"of": "again"})
    assert {one.state(), other.state()} == {State.CANCELLED}
    oracle.settle(ground)


@pytest.mark.timeout(240)
def test_submitting_and_giving_up_at_any_moment(ground: Ground, earlier: FaultWorker) -> None:
    """Random moves while the job is queued, rendered, stopped and rendered again."""
    rng = random.Random(1)
    lies: list[object] = []
    for _ in range(150):
        job = ground.job("sleep:0.05")
        wanted: list[JobHandle] = []
        given_up: list[tuple[JobHandle, State]] = []
        moves: list[str] = []
        for _ in range(rng.randint(2, 6)):
            if wanted and rng.random() < 0.5:
                handle = wanted.pop(rng.randrange(len(wanted)))
                said = handle.cancel()
                moves.append(f"cancel {handle.submission[:4]} {said}")
                if said is not State.DONE:
                    given_up.append((handle, said))
            else:
                wanted.append(submit_job(job))
                moves.append(f"submit {wanted[-1].submission[:4]}")
            if rng.random() < 0.5:
                wait_until("a moment", lambda: rng.random() < 0.2)
        for handle in wanted:
            try:
                handle.result(SOON_S)
            except (JobCancelledError, TimeoutError) as error:
                lies.append((moves, "wanted", handle.submission[:4], repr(error)))
        for handle, said in given_up:
            seen = [handle.state()]
            if not seen[-1].is_final:
                wait_until("final", lambda handle=handle: handle.state().is_final)
                seen.append(handle.state())
            may_be = {State.CANCELLED} if said is State.CANCELLED else {State.CANCELLED, State.DONE}
            if seen[-1] not in may_be:
                lies.append((moves, "given up", handle.submission[:4], said, seen))
    for each in lies:
        print(each)
    assert not lies


def test_what_the_last_worker_of_this_version_held_when_it_was_killed_waits_for_the_next(
    ground: Ground, tree: Path
) -> None:
    """Workers of earlier versions know nothing of what it held, and go on with what is queued."""
    newer = ground.worker()
    with ground.holding() as hold, ground.redis as client:
        held = ground.submit(3, hold)
        ground.journal.wait_for("start", held)
        newer.kill()
        ground.worker(tree=tree)
        ground.journal.wait_for("put", ground.submit(5))
        assert client.hlen(UNACKED) == 3
        newer.launch()
        newer.wait_ready()
        wait_until("taken again", lambda: min(ground.journal.count("start")[each] for each in held) == 2)
    oracle.settle(ground)


def test_a_job_with_a_field_that_the_first_version_does_not_know_is_dropped_there_until_it_is_sent_again(
    ground: Ground, tree: Path, earlier: FaultWorker
) -> None:
    """Its record stays queued, as docs/upgrades.md says. Later versions render it."""
    handle = submit_job(ground.job(guidance_start=0.5))
    plain = ground.submit(1)
    ground.journal.wait_for("put", plain)
    if tree.name.startswith("b89d500"):
        assert handle.result(SOON_S).state is State.DONE
        return
    wait_until("dropped", lambda: ground.messages() == 0)
    assert handle.state() is State.QUEUED
    earlier.stop()
    ground.worker()
    assert submit_job(handle.record().job).result(SOON_S).state is State.DONE
    assert handle.state() is State.DONE


def test_a_job_that_only_this_version_reads_waits_for_a_worker_of_it(
    ground: Ground, earlier: FaultWorker
) -> None:
    """Earlier workers give its message back, again and again; they park none."""
    handle = submit_job(ground.job(prompt_syntax="a1111"))
    assert handle.record().job.version == 2
    ground.journal.wait_for("put", ground.submit(5))
    assert handle.state() is State.QUEUED
    assert "the live workers read up to version 1" in handle.progress().note
    ground.worker()
    assert handle.result(SOON_S).state is State.DONE


def test_an_earlier_worker_ignores_the_trace_of_a_job(
    ground: Ground, earlier: FaultWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = SentSpan()
    sent.context = TraceContext("a" * 32, "b" * 16, True, "vendor=1")
    monkeypatch.setattr("producer.client.sending.sending", lambda *_: contextlib.nullcontext(sent))
    handle = submit_job(ground.job())
    assert handle.result(SOON_S).state is State.DONE
