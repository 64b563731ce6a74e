"""`smallcat failed`: jobs that failed for good, in a real Valkey."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from producer.cli import failed
from producer.cli.job_lines import lines_of
from producer.cli.main import cli
from producer.client import submit_job
from producer.client.job_result import JobResult
from producer.session import session
from worker.contract.errors import (
    CallerError,
    InvalidJobError,
    JobTooLargeError,
    RenderError,
    SmallcatError,
    UnknownJobError,
)
from worker.contract.found_message import digest_of
from worker.contract.job import Job
from worker.contract.message import MAX_VERSION, RunMark
from worker.contract.queues import PARKED, UNDECODABLE, parked_list_of, queue_of
from worker.contract.record import Attempt, State
from worker.state.failures import Failure, Failures
from worker.state.keys import run_key
from worker.state.parked import drop_parked, parked_messages
from worker.state.records import Claim, Records
from worker.state.redis_client import connect


@pytest.fixture(autouse=True)
def redis_url(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)


def fail(prompt: str, error: SmallcatError, run: str = "") -> str:
    """A job that was tried twice and failed with `error`."""
    handle = submit_job(prompt, seed=1)
    records, job = session().records, handle.record().job
    where = {"worker": "w1", "lease_s": 30, "max_attempts": 2, "queue": queue_of(job), "run": run}
    for attempt in (1, 2):
        verdict, number, _ = records.claim(job, "m1", **where)  # type: ignore[arg-type]
        assert (verdict, number) == ("render", attempt)
        if attempt == 1:
            tried = Attempt(attempt=1, worker="w1", at=1.0, error_type=type(error).__name__, error=str(error))
            records.give_back(handle.id, "m1", tried)
    assert records.failed(handle.id, "m1", error)
    return handle.id


class SomebodysError(Exception):
    """Of no module of ours."""


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


def test_a_list_without_jobs_says_so_and_an_unknown_class_is_refused() -> None:
    def said(*words: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(cli, ["failed", *words])
        error = "" if isinstance(done.exception, SystemExit) else str(done.exception or "")
        return done.exit_code, done.stdout, done.stderr + error

    assert said("list") == (0, "", "No job failed for good.\n")
    assert json.loads(run("list", "--json")) == []
    assert said("list", "--error", "RenderError")[2] == "No job failed for good with RenderError.\n"
    session().redis.hset(run_key("abc"), "fed", 0)
    assert said("list", "--run", "abc")[2] == "No job failed for good in the run abc.\n"
    assert said("list", "--run", "abd")[2] == (
        "There is no run abd: see `smallcat runs`. A run expires some days later."
    )
    for command in (["list"], ["list", "--json"], ["retry"], ["drop"]):
        code, out, error = said(*command, "--error", "RendrError")
        assert (code, out, error) == (
            1,
            "",
            "There is no error class 'RendrError': did you mean RenderError?",
        )
    fail("one", SomebodysError("x"))
    assert "SomebodysError: x" in run("list", "--error", "SomebodysError")


def test_a_failed_job_shows_each_attempt_with_its_worker() -> None:
    job_id = fail("one", RenderError("bad kernel"))
    shown = run("show", job_id)
    assert "attempt 1" in shown
    assert "attempt 2" in shown
    assert shown.splitlines()[-1].endswith("RenderError: bad kernel"), "the last attempt has the job's error"
    assert shown.count("w1") == 2
    assert "'one'" in shown


def test_a_failed_job_shows_what_it_asked_for_beside_its_prompt() -> None:
    job = Job.parse(
        {"prompt": "a cat", "seed": 1, "loras": "detail=0.8:te=0.5; pixel", "schedule": "karras"}
        | {"scheduler": "euler", "image": f"sha256:{'ab' * 32}:64x48", "strength": 0.4, "clip_skip": 2}
    )
    assert lines_of(job) == [
        "schedule   karras",
        "clip_skip  2",
        "loras      detail=0.8:te=0.5; pixel=1",
        f"image      sha256:{'ab' * 32}:64x48",
        "strength   0.4",
    ]
    record = JobResult(id=job.id, state=State.FAILED, job=job)
    assert {*lines_of(job)[1:]} < {*failed.lines(record)}
    assert not any(line.startswith("schedule") for line in failed.lines(record))


def test_by_run() -> None:
    mark = RunMark("abc123", 1, 0, 5, 7).encode()
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


def test_a_job_that_only_an_earlier_version_took_is_shown_and_refused_alone_when_it_is_tried_again() -> None:
    """Whatever its state: it was stored by the limits of then."""
    fields = {"prompt": "old", "seed": 1, "upscale": 2, "upscale_strength": 0}
    job, records = Job.parse(fields, is_new=False).opened(), session().records
    records.submitted(job, queue_of(job))
    old = job.id
    for command in (["status", old], ["status"], ["status", old, "--json"]):
        assert old in CliRunner().invoke(cli, command, catch_exceptions=False).stdout
    where: dict[str, Any] = {"worker": "w1", "lease_s": 30, "max_attempts": 2, "queue": queue_of(job)}
    records.claim(job, "m1", **where)
    assert records.failed(old, "m1", InvalidJobError("upscale_strength is 0, which leaves none of 20 steps"))
    other = fail("new", RenderError("x"))

    assert re.search("\nupscale_strength +0(.0)?\n", run("show", old))
    assert "leaves none of 20 steps" in run("list")
    assert json.loads(run("list", old, "--json"))[0]["job"]["upscale_strength"] == 0
    done = CliRunner().invoke(cli, ["failed", "retry", "--all"])
    assert (done.stdout, type(done.exception)) == ("1 submitted again\n", InvalidJobError)
    assert str(done.exception) == (
        f"Job {old} is not submitted again: upscale_strength is 0.0: it must be above 0 and up to 1."
    )
    assert [record.id for record in failed.select()] == [old]
    assert failed.JobHandle(other).state() is State.QUEUED


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


@pytest.mark.parametrize("command", ["list", "show", "retry", "drop"])
def test_a_command_refuses_an_unknown_id_and_touches_no_other(command: str) -> None:
    job_id = fail("one", RenderError("x"))
    with pytest.raises(UnknownJobError, match="No failed job has the id nonsense"):
        CliRunner().invoke(cli, ["failed", command, job_id, "nonsense"], catch_exceptions=False)
    assert [record.id for record in failed.select()] == [job_id]


@pytest.fixture
def expires_meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets a job's record expire between the reading of the list and that of the records."""

    def arrange(job_id: str) -> None:
        read = Failures.list

        def and_expires(failures: Failures) -> list[Failure]:
            found = read(failures)
            session().redis.delete(f"smallcat:job:{job_id}")
            return found

        monkeypatch.setattr(Failures, "list", and_expires)

    return arrange


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_record_that_expires_while_it_is_read_is_left_out(
    expires_meanwhile: Callable[[str], None], flags: tuple[str, ...]
) -> None:
    gone, other = fail("one", RenderError("x")), fail("two", RenderError("x"))
    expires_meanwhile(gone)
    shown = run("list", *flags)
    assert other in shown
    assert run("retry", "--all") == "1 submitted again\n"
    assert failed.select() == []


def test_a_record_that_was_asked_for_by_its_id_and_expires_is_unknown(
    expires_meanwhile: Callable[[str], None],
) -> None:
    gone = fail("one", RenderError("x"))
    expires_meanwhile(gone)
    with pytest.raises(UnknownJobError, match=gone):
        failed.select([gone])


def test_twenty_thousand_failed_jobs_are_listed_in_a_second() -> None:
    number = 20_000
    redis = session().redis
    attempts = {
        f"try:{attempt}": Attempt(
            attempt=attempt, worker="w1", at=attempt, error_type="RenderError", error="bad kernel"
        ).model_dump_json()
        for attempt in (1, 2, 3)
    }
    record = {"state": "failed", "error_type": "RenderError", "error": "bad kernel", "queue": "q"}
    record |= {"submitted_at": "1.5", "attempts": "3", "worker": "w1", "step": "3", "steps": "30"}
    job = Job(prompt="a photo of a small cat, " * 10, seed=1, width=1024, height=1024, steps=30)
    with redis.pipeline(transaction=False) as pipe:
        for each in range(number):
            pipe.hset(f"smallcat:job:{each:032x}", mapping=record | attempts | {"job": job.model_dump_json()})
            pipe.zadd("smallcat:failed", {f"{each:032x}": each})
            if each % 1_000 == 999:
                pipe.execute()

    def worked_s() -> float:
        """Processor time of this process and of Redis: what else a busy machine does is not in it."""
        server = redis.info("cpu")
        return time.process_time() + float(server["used_cpu_user"]) + float(server["used_cpu_sys"])

    took = []
    for _ in range(3):
        began = worked_s()
        shown = run("list")
        took.append(worked_s() - began)
    lines = shown.splitlines()
    assert len(lines) == number
    assert lines[0].startswith(f"{number - 1:032x}  ")
    assert lines[0].endswith("RenderError: bad kernel")
    assert min(took) < 1, took


def test_messages_that_no_worker_could_read_are_listed_with_the_reason_and_escaped(
    valkey: ValkeyProcess,
) -> None:
    head = {"at": 1.5, "queue": "smallcat.m", "reason": "it is \x1b[31mred", "bytes": 5_000}
    message = b'{"a": "\x1b[2J\xff"}' + b" " * 300
    newer = parked_list_of("smallcat.m", 4, 2)
    with Redis.from_url(valkey.url) as client:
        client.lpush(
            UNDECODABLE, b"as an earlier version left it", json.dumps(head).encode() + b"\n" + message
        )
        client.lpush(newer, "one", "two")
        client.sadd(PARKED, newer, parked_list_of("smallcat.m", 5, 2))
    shown = run("list", "--unreadable")
    assert "it is \\x1b[31mred (5,000 bytes)" in shown
    assert '{"a": "\\x1b[2J\\\\xff"}' in shown
    assert "an earlier version could not read it" in shown
    assert "smallcat.m  2 messages of version 2 wait for a newer worker" in shown
    assert shown.isprintable() or shown.replace("\n", "").isprintable()
    as_json = json.loads(run("list", "--unreadable", "--json"))
    assert as_json["unreadable"][0]["reason"] == head["reason"]
    assert as_json["unreadable"][0]["message"] == message.decode(errors="backslashreplace")
    assert as_json["parked"] == [{"queue": "smallcat.m", "version": 2, "messages": 2}]


def park(client: Redis, records: Records, number: int, version: int = MAX_VERSION) -> str:
    """Submit a job whose message an older worker has parked. Returns its id."""
    job = Job(prompt=f"p{number}", seed=number)
    message_id = f"{job.id}-{number:08x}"
    headers = {"id": message_id, "argsrepr": f"('p{number}', seed {number})"}
    raw = json.dumps({"body": "newer", "headers": headers, "properties": {"delivery_tag": str(number)}})
    name = parked_list_of("smallcat.m", 4, version)
    records.submitted(job, "smallcat.m", "s", message_id, digest_of(raw), (name, raw))
    client.sadd(PARKED, name)
    return job.id


def test_parked_messages_are_listed_and_dropped_and_their_jobs_say_so(valkey: ValkeyProcess) -> None:
    with connect(valkey.url, retry_s=2) as client:
        records = Records(client, 1_000)
        ids = [park(client, records, number) for number in range(450)]
        listed = run("list", "--parked").splitlines()
        assert listed[0] == f"{ids[0]}  smallcat.m  version {MAX_VERSION}  ('p0', seed 0)"
        assert [line[:32] for line in listed] == ids
        as_json = json.loads(run("list", "--parked", ids[7], "--json"))
        assert as_json == [
            {"id": ids[7], "queue": "smallcat.m", "version": MAX_VERSION, "shown": "('p7', seed 7)"}
        ]
        assert run("drop", "--parked", ids[7], ids[8]).startswith("2 messages dropped")
        assert [records.get(job_id).state for job_id in ids[6:10]] == ["queued", "failed", "failed", "queued"]
        error = f"it is of version {MAX_VERSION} and was dropped before a worker came that reads it"
        assert error in (records.get(ids[7]).error or "")
        assert ids[7] in run("list")
        assert json.loads(run("drop", "--parked", "--all", "--json")) == {"dropped": 448}
        assert run("list", "--parked") == ""
        assert {records.get(job_id).state for job_id in ids} == {"failed"}


def test_a_parked_message_that_is_taken_while_it_is_dropped_is_done(valkey: ValkeyProcess) -> None:
    with connect(valkey.url, retry_s=2) as client:
        records = Records(client, 1_000)
        job_id = park(client, records, 1)
        [found] = parked_messages(client)
        job = records.get(job_id).job
        client.rpop(found.list)
        assert not drop_parked(client, records, found)
        assert (
            records.claim(
                job, f"{job_id}-{1:08x}/1", worker="newer", lease_s=30.0, max_attempts=3, queue="smallcat.m"
            )[0]
            is Claim.RENDER
        )
        assert not drop_parked(client, records, found)
        assert records.get(job_id).state == "running"


def test_dropping_parked_messages_needs_a_choice() -> None:
    for words, said in (
        (["drop", "--parked"], "Which jobs?"),
        (["drop", "--parked", "--all", "--run", "r"], "leave out --error, --run"),
        (["list", "--parked", "--unreadable"], "leave out --error, --run"),
    ):
        refused = CliRunner().invoke(cli, ["failed", *words])
        assert refused.exit_code != 0
        assert said in refused.stderr + str(refused.exception)


def test_an_id_without_a_parked_message_is_an_error(valkey: ValkeyProcess) -> None:
    refused = CliRunner().invoke(cli, ["failed", "drop", "--parked", "0" * 32])
    assert "see `smallcat failed list --parked`" in str(refused.exception)


def test_unreadable_messages_have_no_ids() -> None:
    refused = CliRunner().invoke(cli, ["failed", "list", "--unreadable", "an-id"])
    assert refused.exit_code == 2
    assert "leave out ids" in refused.stderr


def test_jobs_that_begin_with_others_pictures_are_retried_after_them() -> None:
    parent = submit_job("a cat", seed=1, width=64, height=64)
    child = submit_job("a dog", seed=2, image=parent)
    last = submit_job("a hat", seed=3, image=child, mask=parent)
    job = parent.record().job
    session().records.claim(job, "m1", worker="w", lease_s=30, max_attempts=2, queue=queue_of(job))
    assert session().records.failed(parent.id, "m1", RenderError("bad kernel"))
    assert {record.id for record in failed.select()} == {parent.id, child.id, last.id}
    handles, [refused] = failed.retry(failed.select([child.id]))
    assert handles == []
    assert str(refused).startswith(f"Job {child.id} is not submitted again: image is the picture of")
    assert "3 submitted again" in run("retry", last.id, child.id, parent.id)
    assert (parent.state(), child.state(), last.state()) == (State.QUEUED, State.WAITING, State.WAITING)
