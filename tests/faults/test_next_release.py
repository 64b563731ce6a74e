"""Messages of the next release: they wait for a worker that reads them, are not lost, and hold up nobody.

tests/faults/releases.py makes that release. tests/faults/test_upgrade.py has both under load and kills.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from producer import JobHandle, submit_job
from producer.cli.doctor import examine
from producer.cli.failed import parked
from producer.cli.main import cli
from tests.faults import oracle
from tests.faults.harness import Ground, wait_until
from tests.faults.releases import NEXT_VERSION, OtherProducer, account_with_tints, next_release, waiting
from tests.faults.runner import SERVED
from tests.faults.test_security import arguments, envelope
from worker.contract.errors import UnknownJobError
from worker.contract.job import FORMAT_VERSION
from worker.contract.message import payload_of, route_of
from worker.contract.queues import queues_of

QUEUE = queues_of(SERVED)[0]


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the next release."""
    return next_release(tmp_path_factory.mktemp("next"))


@pytest.mark.timeout(240)
def test_a_job_of_the_next_release_waits_for_a_worker_of_it(
    ground: Ground, after: Path, tmp_path: Path
) -> None:
    """An older worker takes what it can read, whoever sent it; both say what the rest waits for."""
    table = tmp_path / "cats.csv"
    table.write_text("prompt,seed,tint\na cat,1,2\na dog,2,\na cow,3,1\n")
    first = ground.worker()
    with OtherProducer(ground, after) as producer:
        plain = producer(ground.job())
        tinted = [producer(ground.job(), tint=number % 2 + 1) for number in range(3)]
        ground.journal.wait_for("put", [plain])
        wait_until("parked", lambda: waiting(ground) == 3)
        assert parked() == [{"queue": QUEUE, "version": NEXT_VERSION, "messages": 3}]
        findings = [each for each in examine() if each.what == "queues"]
        assert [each.ok for each in findings] == [False]
        assert findings[0].text == (
            f"3 messages of version {NEXT_VERSION} wait for {QUEUE}, and the live workers read up to version "
            f"{FORMAT_VERSION}: upgrade one, which then takes them"
        )
        with pytest.raises(
            UnknownJobError, match=r"is of a newer version of smallcat, whose jobs have tint: up"
        ):
            JobHandle(tinted[0]).record()
        shown = producer.command("status", tinted[0]).stdout
        assert "queued" in shown
        assert "queue      3 waiting, 0 workers" in shown
        why = f"of version {NEXT_VERSION}, and the live workers read up to version {FORMAT_VERSION}. "
        assert why in shown
        listed = CliRunner().invoke(cli, ["failed", "list"])
        assert f"note  Not failed: {QUEUE}  3 messages of version {NEXT_VERSION} wait" in listed.stderr
        # A run: what waits is neither lost nor in anybody's way.
        with ThreadPoolExecutor() as pool:
            run = pool.submit(producer.command, "ingest", str(table))
            wait_until("parked, too", lambda: waiting(ground) == 5)
            newer = ground.worker(tree=after)
            ground.journal.wait_for("put", tinted)
            assert run.result().returncode == 0, run.result().stderr
            assert "sent again" not in run.result().stderr
    assert waiting(ground) == 0
    oracle.settled(ground)
    rows = [json.loads(line) for line in (tmp_path / "cats.csv.manifest.jsonl").read_text().splitlines()]
    assert [(row["tint"], row["state"]) for row in rows] == [(2, "done"), (0, "done"), (1, "done")]
    by = {event.job: event.pid for event in ground.journal.events() if event.what == "put"}
    assert by[plain] == first.pid
    ids = [*tinted, *(row["id"] for row in rows)]
    assert account_with_tints(ground, ids) == [*tinted, rows[0]["id"], rows[2]["id"]]
    assert {by[job_id] for job_id in ids if job_id != rows[1]["id"]} == {newer.pid}
    assert max(ground.journal.count("put").values()) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_5000_messages_of_a_newer_version_are_looked_at_once_and_hold_up_the_others_for_that_alone(
    ground: Ground,
) -> None:
    """They lie before honest jobs of the same priority. Looked at again and again, 5,000 starved a worker."""
    number = 5_000
    worker = ground.worker()
    sent: dict[str, float] = {}

    def latencies(ids: list[str]) -> list[float]:
        ground.journal.wait_for("put", ids, 120)
        done = {event.job: event.at_s for event in ground.journal.events() if event.what == "put"}
        return sorted(done[job_id] - sent[job_id] for job_id in ids)

    def submit(count: int) -> list[str]:
        ids = []
        for _ in range(count):
            job = ground.job()
            sent[job.id] = time.monotonic()
            ids += [submit_job(job).id]
        ground.ids += ids
        return ids

    before = latencies(submit(100))
    with ground.redis as client, client.pipeline() as pipe:
        for _ in range(number):
            job = ground.job()
            body = arguments({**payload_of(job), "version": NEXT_VERSION, "to_come": 1})
            pipe.lpush(route_of(job).list, envelope(body, id=f"{job.id}-newer"))
        began_s = time.monotonic()
        pipe.execute()
    during = latencies(submit(100))
    wait_until("all parked", lambda: waiting(ground) == number, 120)
    looked_s = time.monotonic() - began_s
    after = latencies(submit(100))
    assert worker.running
    oracle.settle(ground)
    print(
        f"{number} newer messages were parked in {looked_s:.1f} s, {number / looked_s:.0f} a second; from "
        f"submission to picture, ms, median and worst of 100 jobs: before {ms(before)}, behind them "
        f"{ms(during)}, after {ms(after)}"
    )
    # Each is looked at once: the jobs behind them wait for that, and no job afterwards.
    assert during[-1] < looked_s + 5
    assert after[50] < 2 * before[50] + 1


def ms(seconds: list[float]) -> str:
    return f"{1000 * seconds[len(seconds) // 2]:.0f} and {1000 * seconds[-1]:.0f}"
