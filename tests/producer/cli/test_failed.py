"""`smallcat failed`: jobs that failed for good, in a real Valkey."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from deploy.embedded.servers import ValkeyProcess
from producer.cli import failed
from producer.cli.main import cli
from producer.client import _client, submit_job
from worker.contract.errors import CallerError, JobTooLargeError, RenderError, SmallcatError, UnknownJobError
from worker.contract.message import run_mark
from worker.contract.queues import queue_of
from worker.contract.record import Attempt, State


@pytest.fixture(autouse=True)
def redis_url(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)


def fail(prompt: str, error: SmallcatError, run: str = "") -> str:
    """A job that was tried twice and failed with `error`."""
    handle = submit_job(prompt, seed=1)
    records, job = _client().records, handle.record().job
    where = {"worker": "w1", "lease_s": 30, "max_attempts": 2, "queue": queue_of(job), "run": run}
    for attempt in (1, 2):
        verdict, number, _ = records.claim(job, "m1", **where)  # type: ignore[arg-type]
        assert (verdict, number) == ("render", attempt)
        if attempt == 1:
            told = Attempt(attempt=1, worker="w1", at=1.0, error_type=type(error).__name__, error=str(error))
            records.retried(handle.id, "m1", told)
    assert records.failed(handle.id, "m1", error)
    return handle.id


def run(*words: str) -> str:
    done = CliRunner().invoke(cli, ["failed", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_failed_jobs_are_listed_the_latest_first_and_by_error() -> None:
    first, second = fail("one", RenderError("bad kernel")), fail("two", JobTooLargeError("too large"))
    assert {record.id for record in failed.select()} == {first, second}
    assert [record.id for record in failed.select(error_type="RenderError")] == [first]
    assert "RenderError: bad kernel" in run("list", "--error", "RenderError")
    assert json.loads(run("list", second, "--json"))[0]["error_type"] == "JobTooLargeError"


def test_a_failed_job_shows_each_attempt_with_its_worker() -> None:
    job_id = fail("one", RenderError("bad kernel"))
    told = run("show", job_id)
    assert "attempt 1" in told
    assert "attempt 2" in told
    assert told.count("w1") == 2
    assert "'one'" in told


def test_by_run() -> None:
    mark = run_mark("abc123", 1, 0, 5, 7)
    inside = fail("in", RenderError("x"), run=mark)
    fail("out", RenderError("x"))
    assert [record.id for record in failed.select(run="abc123")] == [inside]


def test_a_job_that_is_tried_again_is_queued_with_all_its_attempts_and_no_longer_failed() -> None:
    job_id = fail("one", RenderError("bad kernel"))
    assert "1 submitted again" in run("retry", job_id)
    [handle] = [failed.JobHandle(job_id)]
    record = handle.record()
    assert (record.state, record.attempts, record.tries) == (State.QUEUED, 0, ())
    assert failed.select() == []


def test_a_job_that_is_dropped_is_forgotten() -> None:
    job_id, other = fail("one", RenderError("x")), fail("two", RenderError("x"))
    assert "1 forgotten" in run("drop", job_id)
    assert [record.id for record in failed.select()] == [other]


@pytest.mark.parametrize("command", ["retry", "drop"])
def test_every_failed_job_is_taken_only_when_asked_for(command: str) -> None:
    fail("one", RenderError("x"))
    with pytest.raises(CallerError, match="--all"):
        CliRunner().invoke(cli, ["failed", command], catch_exceptions=False)
    assert len(failed.select()) == 1
    run(command, "--all")
    assert failed.select() == []


def test_an_id_that_is_no_failed_jobs_is_refused() -> None:
    waiting = submit_job("waits").id
    with pytest.raises(UnknownJobError, match=waiting):
        failed.select([waiting])
