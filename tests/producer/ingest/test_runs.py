"""Runs as things: listed, shown and cancelled, against a real Redis; `Drain` is the worker."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from deploy.embedded.servers import ValkeyProcess
from producer.cli.ingest_display import QuietDisplay
from producer.ingest.feeder import Ingest
from producer.ingest.run_webhook import set_webhook
from producer.ingest.runs import cancel_run, find_run, list_runs
from producer.ingest.submit_file import make_ingest, make_plan, make_variants
from producer.ingest.types import Options, Outcome
from tests.drain import Drain
from tests.fast_worker import SERVED, announce
from tests.full_redis import full
from worker.broker.transport import UNACKED
from worker.contract.errors import UnknownJobError
from worker.contract.queues import lists_of, queues_of
from worker.contract.record import State
from worker.state.keys import TOLD_BY_PRODUCERS

QUEUE = queues_of(SERVED)[0]


@pytest.fixture
def drain(valkey: ValkeyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drain:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("producer.ingest.feeder.POLL_EVERY_S", 0.005)
    announce(valkey.url)
    return Drain(valkey.url, QUEUE)


def ingest(jobs: int, *, steps: int = 4, **options: object) -> Ingest:
    Path("p.txt").write_text("".join(f"cat {n}\n" for n in range(jobs)))
    variants = make_variants({"steps": steps}, 1, None, {}, None, None, literal=False)
    plan = make_plan(["p.txt"], file_format=None, variants=variants)
    return make_ingest(plan, Options(**options), QuietDisplay())  # type: ignore[arg-type]


def test_runs_are_listed_with_state_counts_and_files(drain: Drain) -> None:
    finished = ingest(3, detach=True)()
    drain.all()
    finished = ingest(3)()
    waiting = ingest(3, steps=5, detach=True)()
    stopped = ingest(3, steps=6, run="mine")
    stopped.stop()
    stopped()
    found = {each.run: each for each in list_runs(drain.client)}
    assert list(found) == ["mine", waiting.run, finished.run]
    assert [each.state for each in found.values()] == ["stopped", "waiting", "finished"]
    assert {each.files for each in found.values()} == {("p.txt",)}
    assert (found[finished.run].done, found[finished.run].total, found[finished.run].failed) == (3, 3, 0)
    assert found[finished.run].manifest == str(Path("p.txt.manifest.jsonl").resolve())
    fed = ingest(3, steps=7)
    fed.run.take()
    assert str(find_run(drain.client, fed.run.id).feeder).startswith("Process ")
    drain.client.delete("smallcat:run:mine")
    assert "mine" not in {each.run for each in list_runs(drain.client)}
    with pytest.raises(UnknownJobError, match="no run mine"):
        find_run(drain.client, "mine")


def test_a_run_is_cancelled_while_redis_is_full(drain: Drain) -> None:
    """Its queued messages are what fills it."""
    outcome = ingest(5, detach=True)()
    set_webhook(drain.client, outcome.run, '{"url": "https://example.com"}', of_jobs=False)
    with full(drain.client):
        cancel_run(drain.client, drain.records, outcome.run)
        assert find_run(drain.client, outcome.run).state == "cancelled"
        (told,) = drain.client.lrange(TOLD_BY_PRODUCERS, 0, -1)
        values = json.loads(str(told).partition(" ")[2])
        assert (values["state"], values["total"], values["done"]) == ("cancelled", 5, 0)


def test_a_cancelled_run_sends_no_more_and_its_queued_jobs_are_not_rendered(drain: Drain) -> None:
    run = ingest(50, max_queued=10)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run()))
    thread.start()
    while (running := drain.take()) is None:
        pass
    # As the transport holds a message that a worker has.
    text = drain.client.lindex(next(name for name in lists_of(QUEUE) if drain.client.llen(name)), 0)
    drain.client.hset(UNACKED, "tag", f"[{text}, 0, 0]")
    before = cancel_run(drain.client, drain.records, run.run.id)
    assert before.state == "feeding"
    thread.join(timeout=30)
    assert [each.state for each in outcomes] == ["cancelled"]
    seen = len(drain.seen)
    while found := drain.take():  # Each claim drops the job: nothing is there to end.
        assert not drain.client.exists(f"smallcat:job:{found[0].id}")
    assert len(drain.seen) > seen
    info = find_run(drain.client, run.run.id)
    assert (info.state, info.done, info.failed, info.cancelled) == ("cancelled", 0, 0, info.sent - 1)
    drain.end(*running)
    assert find_run(drain.client, run.run.id).done == 1
    # The same again begins anew, and leaves nothing out.
    over = threading.Event()
    worker = threading.Thread(target=lambda: [drain.all() for _ in iter(lambda: over.wait(0.002), True)])
    worker.start()
    outcome = ingest(50)()
    over.set()
    worker.join()
    assert (outcome.state, outcome.done, outcome.cancelled) == ("finished", 50, 0)
    info = find_run(drain.client, run.run.id)
    assert (info.files, info.done, info.failed, info.cancelled) == (("p.txt",), 50, 0, 0)


def test_cancelling_a_run_asks_what_runs_to_stop_unless_somebody_else_wants_it(drain: Drain) -> None:
    run = ingest(2, detach=True)()
    held = []
    for number in range(2):
        text = drain.client.lindex(next(name for name in lists_of(QUEUE) if drain.client.llen(name)), -1)
        found = drain.take()
        assert found is not None
        held.append(found[0])
        drain.client.hset(UNACKED, f"tag{number}", f"[{text}, 0, 0]")
    drain.records.submitted(held[1].job, QUEUE)  # Somebody waits for this one.
    cancel_run(drain.client, drain.records, run.run)
    asked = [drain.client.hget(f"smallcat:job:{message.id}", "cancel") for message in held]
    assert asked == ["1", None]
    assert drain.records.get(held[1].id).state is State.RUNNING
    # A run that is cancelled already stays so.
    assert cancel_run(drain.client, drain.records, run.run).state == "cancelled"
