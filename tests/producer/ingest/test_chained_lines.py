"""Lines of prompt files that begin with the pictures of jobs that are not done, against a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from producer.cli.ingest_display import QuietDisplay
from producer.cli.main import cli
from producer.ingest.feeder import Ingest
from producer.ingest.pictures import Pictures
from producer.ingest.run_state import Run
from producer.ingest.runs import cancel_run, find_run
from producer.ingest.sent import Sent
from producer.ingest.submit_file import make_ingest, make_plan, make_variants
from producer.ingest.types import Options, Outcome
from producer.session import session
from tests.drain import Drain
from tests.producer.ingest.test_feeder import QUEUE, drain, manifest, quick, waiting
from worker.contract.errors import RenderError, StorageError
from worker.contract.input_reference import jobs_of
from worker.contract.job import Job
from worker.contract.message import RunMark
from worker.contract.record import JobRecord, State
from worker.state.chains import Chains
from worker.state.failures import Failures
from worker.state.keys import WAITING, job_key, run_key

__all__ = ["drain", "quick"]

FILE = Path("p.csv")


class Parent:
    """A job that was submitted, of which no message is in a queue: a test says what becomes of it."""

    def __init__(self, drain: Drain, seed: int = 1) -> None:
        self._records = drain.records
        self.job = session().fleet.resolve(
            Job.parse({"prompt": "a cat", "seed": seed, "width": 64, "height": 64})
        )
        self.id = self.job.id
        self.submit()

    def submit(self) -> None:
        self._records.submitted(self.job, QUEUE)

    def finish(self) -> None:
        uri = f"s3://nowhere/{self.id}.png"
        assert self._records.done(JobRecord(id=self.id, state=State.DONE, job=self.job, uri=uri))

    def fail(self) -> None:
        self._records.claim(self.job, "m", worker="w", lease_s=30, max_attempts=3, queue=QUEUE)
        assert self._records.failed(self.id, "m", RenderError("It was asked to fail."))


def ingest(rows: list[str] | None = None, **options: Any) -> Ingest:
    """A run of a file with the columns prompt and image."""
    if rows is not None:
        FILE.write_text("prompt,seed,image\n" + "".join(f"{each}\n" for each in rows))
    pictures = Pictures(session())
    variants = make_variants({}, 1, None, {}, None, None, literal=False, pictures=pictures)
    plan = make_plan([str(FILE)], file_format=None, variants=variants, pictures=pictures)
    return make_ingest(plan, Options(**options), QuietDisplay())


@contextmanager
def going(run: Ingest) -> Iterator[list[Outcome]]:
    """The run in a thread, until it ends."""
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run()))
    thread.start()
    try:
        yield outcomes
        thread.join(30)
        assert not thread.is_alive()
    finally:
        run.stop()


def until(drain: Drain, run: Ingest, **fields: int | None) -> None:
    """Wait until the run's fields are so; None: it does not have the field."""
    key = run_key(run.run.id)
    wanted = {name: None if value is None else str(value) for name, value in fields.items()}
    event = threading.Event()
    for _ in range(6_000):
        drain.all()
        if dict(zip(wanted, drain.client.hmget(key, *wanted), strict=True)) == wanted:
            return
        event.wait(0.005)
    raise AssertionError(f"{drain.client.hgetall(key)}: not within 30 s")


def look(drain: Drain) -> None:
    """What a worker does from time to time."""
    Chains(drain.client).look(lambda *_: False)


def test_a_line_waits_for_the_picture_that_it_begins_with(drain: Drain) -> None:
    parent, mask = Parent(drain), Parent(drain, 2)
    run = ingest([f"a dog,5,{parent.id}", "a bird,6,", f"a fox,7,job:{parent.id}"])
    with going(run) as outcomes:
        until(drain, run, fed=3, ended=1, waiting=2)
        assert [number for number, _ in drain.seen] == [1]
        held = [str(each) for each in drain.client.hkeys(WAITING)]
        assert {drain.records.get(each).state for each in held} == {State.WAITING}
        assert drain.records.get(held[0]).waits_for == (parent.id,)
        assert find_run(drain.client, run.run.id).waiting == 2
        for command in (["runs"], ["status", "--run", run.run.id]):
            shown = CliRunner().invoke(cli, command, catch_exceptions=False).stdout
            assert ", 1 done, 2 wait for others' pictures  p.csv\n" in shown
        parent.finish()
        until(drain, run, ended=3, waiting=0)
    assert find_run(drain.client, run.run.id).waiting == 0
    assert "picture" not in CliRunner().invoke(cli, ["runs"], catch_exceptions=False).stdout
    assert (outcomes[0].state, outcomes[0].done, outcomes[0].total) == ("finished", 3, 3)
    lines = manifest("p.csv.manifest.jsonl")
    assert [line["state"] for line in lines] == ["done"] * 3
    assert [line["image"] for line in lines] == [f"job:{parent.id}:64x64", "", f"job:{parent.id}:64x64"]
    assert {job_id for _, job_id in drain.seen} == {line["id"] for line in lines}
    assert not drain.client.exists(WAITING)
    # With a mask that waits as well.
    FILE.write_text(f"prompt,seed,image,mask\na dog,8,{parent.id},{mask.id}\n")
    run = ingest()
    with going(run) as outcomes:
        until(drain, run, fed=1, waiting=1)
        mask.finish()
        until(drain, run, ended=1)
    assert outcomes[0].done == 1


def test_lines_fail_with_the_job_that_they_wait_for(drain: Drain) -> None:
    failing, cancelled = Parent(drain), Parent(drain, 2)
    run = ingest([f"a dog,5,{failing.id}", f"a fox,6,{cancelled.id}", "a bird,7,"])
    with going(run) as outcomes:
        until(drain, run, fed=3, ended=1, waiting=2)
        failing.fail()
        until(drain, run, ended=2, waiting=1)
        # A producer may not tell runs: a worker does.
        drain.records.cancel(cancelled.id)
        assert drain.client.hget(run_key(run.run.id), "ended") == "2"
        look(drain)
    assert (outcomes[0].done, outcomes[0].failed, outcomes[0].cancelled) == (1, 2, 0)
    first, second, _ = manifest("p.csv.manifest.jsonl")
    assert (first["state"], first["error_type"]) == ("failed", "InputError")
    assert f"job {failing.id}, which failed: It was asked to fail. Submit that job" in first["error"]
    assert f"job {cancelled.id}, which was cancelled. Submit that job" in second["error"]
    listed = {each.id: each.runs for each in Failures(drain.client).list()}
    assert RunMark.parse(listed[first["id"]][0]).run == run.run.id
    assert listed.keys() == {failing.id, first["id"], second["id"]}
    assert find_run(drain.client, run.run.id).failed == 2


def test_a_run_goes_on_with_the_same_lines_whatever_became_of_the_jobs_that_they_name(drain: Drain) -> None:
    """A line that was a job stays one, and a line that was none is none: their numbers are the run's."""
    failed, unknown = Parent(drain), Parent(drain, 2)
    drain.client.delete(job_key(unknown.id))
    rows = [f"a dog,5,{failed.id}", f"a fox,6,{unknown.id}", "a bird,7,"]
    first = ingest(rows, detach=True)
    assert (first().rejected, waiting(drain)) == (1, 1)
    failed.fail()
    unknown.submit()
    with going(ingest()) as outcomes:
        drain.all()
    assert (outcomes[0].done, outcomes[0].failed, outcomes[0].rejected) == (1, 1, 1)
    lines = manifest("p.csv.manifest.jsonl")
    assert [(line["line"], line["state"]) for line in lines] == [(2, "failed"), (4, "done")]
    reason = Path("p.csv.rejected.jsonl").read_text()
    assert f"image is the picture of job {unknown.id}, which is not known: check the id." in reason


def test_a_cancelled_run_gives_up_the_lines_that_wait(drain: Drain) -> None:
    parent = Parent(drain)
    rows = [f"a dog,5,{parent.id}", "a bird,7,"]
    run = ingest(rows)
    with going(run) as outcomes:
        until(drain, run, ended=1, waiting=1)
        cancel_run(drain.client, drain.records, run.run.id)
    assert outcomes[0].state == "cancelled"
    look(drain)
    info = find_run(drain.client, run.run.id)
    assert (info.done, info.cancelled, info.failed) == (1, 1, 0)
    assert not drain.client.exists(WAITING)
    run = ingest()
    with going(run) as outcomes:
        until(drain, run, fed=2, waiting=1)
        parent.finish()
        until(drain, run, ended=2)
    assert (outcomes[0].state, outcomes[0].done) == ("finished", 2)


def test_a_run_that_begins_anew_before_a_worker_has_looked_waits_again(drain: Drain) -> None:
    parent = Parent(drain)
    run = ingest([f"a dog,5,{parent.id}"], detach=True)
    run()
    cancel_run(drain.client, drain.records, run.run.id)
    run = ingest()
    with going(run) as outcomes:
        # The run of before was cancelled, and waits as well.
        until(drain, run, fed=1, waiting=1, cancelled=None)
        look(drain)
        parent.finish()
        until(drain, run, ended=1)
    assert (outcomes[0].done, [number for number, _ in drain.seen]) == (1, [0])


def test_a_line_that_is_cancelled_by_its_jobs_id_has_ended_for_its_run(drain: Drain) -> None:
    parent = Parent(drain)
    run = ingest([f"a dog,5,{parent.id}"])
    with going(run) as outcomes:
        until(drain, run, waiting=1)
        [child] = drain.client.hkeys(WAITING)
        assert drain.records.cancel(str(child)) is State.CANCELLED
        until(drain, run, ended=1, waiting=0)
    assert (outcomes[0].cancelled, outcomes[0].failed) == (1, 0)
    assert drain.records.get(parent.id).state is State.QUEUED


def test_those_that_wait_count_as_queued(drain: Drain) -> None:
    parent = Parent(drain)
    run = ingest([f"a dog,{seed},{parent.id}" for seed in range(10)], max_queued=4)
    with going(run) as outcomes:
        until(drain, run, fed=4, waiting=4)
        parent.finish()
        until(drain, run, ended=10, waiting=0)
    assert outcomes[0].done == 10


def test_more_may_wait_for_one_job_than_one_call_releases(drain: Drain) -> None:
    parent = Parent(drain)
    run = Run(drain.client, "many", "0" * 32, 600)
    run.take()
    sent = []
    for number in range(1_300):
        job_id = f"{number:032x}"
        image = f"job:{parent.id}:64x64"
        mark = RunMark("many", number, 0, 1, run.now()).encode()
        about = (f'{{"image": "{image}"}}', QUEUE, mark)
        sent.append(Sent(QUEUE, f"message of {job_id}", jobs_of(image), job_id, *about))
    assert run.feed(0, sent, "0:1300:0", None, 0)
    assert (run.status().waiting, run.status().queued) == (1_300, 0)
    parent.finish()
    assert drain.client.llen(QUEUE) == 1_000
    look(drain)
    assert drain.client.llen(QUEUE) == 1_300
    assert run.status().waiting == 0


def test_a_bucket_that_is_away_while_a_lines_picture_is_stored_loses_no_line(
    drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StorageError("The bucket is away.")

    with monkeypatch.context() as now:
        now.setattr(Pictures, "store", away)
        with pytest.raises(StorageError):
            ingest(["a dog,5,", "a bird,6,"])()
    assert waiting(drain) == 0
    with going(ingest()) as outcomes:
        run = ingest()
        until(drain, run, ended=2)
    assert (outcomes[0].state, outcomes[0].done) == ("finished", 2)


def test_a_message_that_was_released_and_is_lost_is_sent_again(drain: Drain) -> None:
    parent = Parent(drain)
    run = ingest([f"a dog,5,{parent.id}"])
    with going(run) as outcomes:
        until(drain, run, fed=1, waiting=1)
        parent.finish()
        drain.client.delete(QUEUE, *drain.client.keys(f"{QUEUE}*"))
        until(drain, run, ended=1)
    assert outcomes[0].done == 1
