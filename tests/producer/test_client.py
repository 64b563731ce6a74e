"""`submit_job` and its handles: against a real Redis and bucket, and against a Redis that fails."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from deploy.embedded.stack import Stack
from producer import JobHandle, JobResult, job_from_image, submit_job
from producer.http.caller import ANYBODY, Caller
from producer.http.jobs import view
from producer.session import ShortLookUp, session
from tests.worker.engine.fake_runner import SERVED, job_of, picture_of
from worker.contract import infotext
from worker.contract.choices import PromptSyntax
from worker.contract.errors import (
    InvalidJobError,
    JobCancelledError,
    NotFiniteError,
    QueueError,
    SettingsError,
    UnknownJobError,
)
from worker.contract.found_message import fingerprint
from worker.contract.job import Job
from worker.contract.job_keywords import JobFields
from worker.contract.job_parameters import MAX_SEED
from worker.contract.queues import queue_of
from worker.contract.record import JobRecord, State, Timings
from worker.contract.served_model import ServedModel
from worker.jobs.image_file import encode
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.keys import LATEST, job_key
from worker.state.records import Records
from worker.state.redis_client import connect
from worker.storage.bucket import Bucket

WORKER = WorkerInfo(
    name="w1", served=SERVED, started_at=1.0, device="CPU", attention="sdpa", max_rows=8, versions={}
)


@pytest.fixture
def environment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    return environment


@pytest.fixture
def client(environment: dict[str, str]) -> Iterator[Redis]:
    with connect(environment["REDIS_URL"], retry_s=2) as client:
        yield client


@pytest.fixture
def records(client: Redis) -> Records:
    return Records(client, 1_000)


@pytest.fixture
def fleet(client: Redis) -> Fleet:
    """With one worker up."""
    fleet = Fleet(client, 1_000)
    fleet.announce(WORKER)
    return fleet


def messages(client: Redis, job: Job) -> list[dict[str, Any]]:
    """The payloads in the job's queue, whatever their priority, next one first."""
    lists = sorted(client.scan_iter(f"{queue_of(job)}*"))
    bodies = [json.loads(text) for name in lists for text in reversed(client.lrange(name, 0, -1))]
    return [json.loads(base64.b64decode(body["body"]))[0][0] for body in bodies]


def finish(records: Records, storage: Bucket, job: Job) -> JobRecord:
    """What a worker does."""
    records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=3, queue=queue_of(job))
    record = JobRecord(
        id=job.id,
        state=State.DONE,
        job=job,
        step=4,
        steps=4,
        uri=storage.uri(job.id, job.format, job.tenant),
        worker="w1",
    )
    picture = encode(picture_of(job), job.format, infotext.write(job))
    lasting = record.model_dump_json().encode()
    storage.put(job.id, job.format, picture, lasting, "image/png", job.tenant)
    records.done(record)
    return record


@pytest.fixture
def storage(environment: dict[str, str]) -> Bucket:
    return Bucket(environment["S3_BUCKET"])


# --- submitting -------------------------------------------------------------------------------------------


def test_a_job_is_sent_as_the_worker_reads_it(fleet: Fleet, client: Redis) -> None:
    handle = submit_job("a small cat", seed=3, steps=9, priority=8, metadata={"mine": 1})
    job = handle.record().job
    assert (job.prompt, job.seed, job.steps, job.width) == ("a small cat", 3, 9, 64)
    assert (job.model, job.revision) == (SERVED.name, SERVED.revision)
    assert messages(client, job) == [{"version": 1, "id": handle.id, "job": job.model_dump(mode="json")}]
    assert job.id == handle.id
    assert handle.state() is State.QUEUED


def test_a_record_notes_the_fingerprint_of_the_message_that_was_sent(fleet: Fleet, client: Redis) -> None:
    for _ in range(2):  # A job of several submissions has those of all.
        handle = submit_job('a "cat" \U0001f408', seed=1)
        [name] = client.scan_iter("smallcat.*")
        raw = str(client.lindex(name, 0))
        assert client.hget(f"smallcat:job:{handle.id}", f"sub:{handle.submission}") == fingerprint(raw)


def test_equal_jobs_are_one_job(fleet: Fleet) -> None:
    first = submit_job("a small cat", seed=3)
    assert submit_job("a small cat", seed=3, priority=9, metadata={"x": 1}).id == first.id
    assert submit_job("a small cat", seed=4).id != first.id


def test_a_drawn_seed_is_recorded(fleet: Fleet) -> None:
    handle, other = submit_job("a small cat"), submit_job("a small cat")
    assert 0 <= handle.record().seed <= MAX_SEED
    assert handle.id != other.id


def test_several_images_have_consecutive_seeds(fleet: Fleet, client: Redis) -> None:
    # As AUTOMATIC1111 1.10 counts the seeds of a batch (modules/processing.py, `all_seeds`).
    handles = submit_job("a small cat", images=3, seed=7)
    assert [handle.id for handle in handles] == [submit_job("a small cat", seed=7 + n).id for n in range(3)]
    drawn = [handle.record().job.seed for handle in submit_job("a small cat", images=2)]
    assert drawn[1] == drawn[0] + 1
    assert [type(each) for each in submit_job("a", images=1)] == [JobHandle]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": 0}, "images is 0: it must be 1 to 1,000."),
        ({"images": 1_001}, "images is 1001: it must be 1 to 1,000."),
        ({"images": True}, "images is True: it must be 1 to 1,000."),
        ({"images": 2, "seed": MAX_SEED}, f"it must be at most {MAX_SEED - 1}."),
    ],
)
def test_images_beyond_their_limits_are_refused_before_anything_is_sent(
    fleet: Fleet, client: Redis, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidJobError, match=re.escape(said)):
        submit_job("a small cat", **fields)
    assert not client.exists(LATEST)


def test_a_whole_job_can_be_submitted_and_changed(fleet: Fleet) -> None:
    job = Job(prompt="a small cat", seed=3, steps=9)
    assert submit_job(job).record().job.steps == 9
    assert submit_job(job, steps=10).record().job.steps == 10


def test_urgent_jobs_are_fetched_first(fleet: Fleet, client: Redis) -> None:
    for priority in (1, 9, 5):
        handle = submit_job("a small cat", seed=priority, priority=priority)
    sent = messages(client, handle.record().job)
    assert [message["job"]["priority"] for message in sent] == [9, 5, 1]


BAD_INPUT: dict[str, dict[str, Any]] = {
    "blank": {"prompt": " "},
    "invisible": {"prompt": "\u200b"},
    "control characters": {"prompt": "\x00\x01"},
    "no text": {"prompt": None},
    "misspelt": {"promt": "x"},
    "size": {"width": 65},
    "scheduler": {"scheduler": "dim"},
    "seed": {"seed": -2},
    "not a number": {"guidance_scale": float("nan")},
    "metadata": {"metadata": {"x": "y" * 5_000}},
    "model": {"model": "a\nb"},
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_sent(client: Redis, what: str) -> None:
    with pytest.raises(InvalidJobError):
        submit_job(**{"prompt": "a small cat"} | BAD_INPUT[what])
    assert client.dbsize() == 0


def test_a_misspelt_setting_is_refused_before_anything_is_sent(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMOUT_S", "1")
    with pytest.raises(SettingsError, match="Did you mean SMALLCAT_SUBMIT_TIMEOUT_S"):
        submit_job("a small cat")
    assert client.dbsize() == 0


# --- a Redis that fails -----------------------------------------------------------------------------------


@contextmanager
def soon(limit_s: float = 10.0) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < limit_s


def test_a_redis_that_is_away_is_reported_in_time(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("REDIS_URL", f"redis://:hunter2@127.0.0.1:{held.getsockname()[1]}/0")
        with soon(), pytest.raises(QueueError) as caught:
            submit_job("a small cat")
    assert "is out of reach" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_wrong_password_is_reported_in_time(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, valkey: ValkeyProcess
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url.replace(valkey.password, "hunter2"))
    with soon(), pytest.raises(QueueError, match="refuses the password") as caught:
        submit_job("a small cat")
    assert "hunter2" not in str(caught.value)


def test_a_full_redis_is_reported_in_time_and_holds_nothing(client: Redis) -> None:
    client.config_set("maxmemory", 1)
    try:
        with soon(), pytest.raises(QueueError, match="is full"):
            submit_job("a small cat")
    finally:
        client.config_set("maxmemory", 0)
    assert client.dbsize() == 0


def test_a_replica_is_reported_in_time(client: Redis) -> None:
    client.replicaof("127.0.0.1", "1")
    try:
        with soon(), pytest.raises(QueueError, match="is read-only"):
            submit_job("a small cat")
    finally:
        client.replicaof("NO", "ONE")
    assert client.dbsize() == 0


def test_a_frozen_redis_is_reported_in_time(
    new_stack: Callable[..., Stack], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey = new_stack(workers=0).valkey
    monkeypatch.setenv("REDIS_URL", valkey.url)
    submit_job("a small cat", seed=1)
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        with soon(), pytest.raises(QueueError, match="is out of reach"):
            submit_job("a small cat", seed=2)
    finally:
        os.kill(valkey.pid, signal.SIGCONT)


def test_connections_that_were_lost_cost_neither_a_job_nor_a_second_message(
    fleet: Fleet, client: Redis
) -> None:
    submit_job("a small cat", seed=1)
    for seed in range(2, 6):
        client.client_kill_filter(_type="normal", skipme=True)
        handle = submit_job("a small cat", seed=seed)
    assert [message["job"]["seed"] for message in messages(client, handle.record().job)] == [1, 2, 3, 4, 5]


def test_a_redis_that_comes_back_in_time_gets_the_job_once(
    new_stack: Callable[..., Stack], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey = new_stack(workers=0).valkey
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "30")
    submit_job("a small cat", seed=1)
    valkey.kill()
    again = threading.Thread(target=valkey.start)
    again.start()
    try:
        job = submit_job("a small cat", seed=2).record().job
    finally:
        again.join()
    with connect(valkey.url, retry_s=2) as client:
        # Each is an open job, for no worker was ever up; they share a queue.
        assert [message["job"]["seed"] for message in messages(client, job)][-1:] == [2]
        assert [message["job"]["seed"] for message in messages(client, job)].count(2) == 1


# --- handles ----------------------------------------------------------------------------------------------


def test_a_result_is_the_record_and_the_way_to_the_picture(
    fleet: Fleet, records: Records, storage: Bucket
) -> None:
    handle = submit_job("a small cat", seed=3, metadata={"mine": 1})
    finish(records, storage, handle.record().job)
    result = handle.result(timeout=5)
    assert (result.id, result.state, result.seed) == (handle.id, State.DONE, 3)
    assert (result.width, result.height, result.worker, result.attempts) == (64, 64, "w1", 1)
    assert result.job.metadata == {"mine": 1}
    assert result.uri == storage.uri(handle.id, result.job.format)
    assert result.url().startswith("http://127.0.0.1:")
    assert np.array_equal(np.asarray(handle.image()), picture_of(result.job).pixels)
    with Image.open(io.BytesIO(result._repr_png_())) as image:
        assert image.format == "PNG"
    assert handle._repr_png_() == result._repr_png_()


def test_a_picture_can_be_asked_for_again_by_itself(fleet: Fleet, records: Records, storage: Bucket) -> None:
    handle = submit_job('a "small" cat,\nSteps: 3', seed=3, steps=9)
    finish(records, storage, handle.record().job)
    assert submit_job(job_from_image(handle.result(5).data())).id == handle.id


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1\x00"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidJobError, match="no picture"):
        job_from_image(data)


def test_a_picture_without_infotext_is_refused() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    with pytest.raises(InvalidJobError, match="holds no infotext"):
        job_from_image(file.getvalue())


def test_a_failed_job_raises_its_own_error(fleet: Fleet, records: Records) -> None:
    handle = submit_job("a small cat", seed=3)
    job = handle.record().job
    records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    records.failed(job.id, "m1", NotFiniteError("NaN at step 3"))
    with pytest.raises(NotFiniteError, match="NaN at step 3"):
        handle.result(5)
    assert handle._repr_png_() is None


def test_a_storage_error_is_one_on_the_callers_side_too(
    fleet: Fleet, client: Redis, environment: dict[str, str]
) -> None:
    """In a process that never loads the storage's module."""
    handle = submit_job("a small cat", seed=3)
    client.hset(
        f"smallcat:job:{handle.id}",
        mapping={"state": "failed", "error_type": "PermanentStorageError", "error": "no bucket"},
    )
    code = (
        "import sys; from producer import JobHandle; from worker.contract.errors import StorageError\n"
        f"try: JobHandle({handle.id!r}).result(5)\n"
        "except StorageError as error: print(type(error).__name__, error, 'boto3' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert shown.stdout == "PermanentStorageError no bucket False\n"


def test_waiting_too_long_is_a_timeout_and_nothing_else(fleet: Fleet) -> None:
    handle = submit_job("a small cat", seed=3)
    for timeout in (0, 0.05):
        with soon(), pytest.raises(TimeoutError, match="is still queued"):
            handle.result(timeout)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(environment: dict[str, str], timeout: float) -> None:
    with pytest.raises(ValueError, match="it must be None or seconds >= 0"):
        JobHandle("x").result(timeout)


def test_a_job_is_cancelled(fleet: Fleet) -> None:
    handle = submit_job("a small cat", seed=3)
    assert handle.cancel() is State.CANCELLED
    assert handle.state() is State.CANCELLED
    with pytest.raises(JobCancelledError):
        handle.result(5)
    # Wanted again, it is queued again.
    assert submit_job("a small cat", seed=3).state() is State.QUEUED


def test_a_running_job_is_asked_to_stop(fleet: Fleet, records: Records) -> None:
    handle = submit_job("a small cat", seed=3)
    records.claim(handle.record().job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    assert handle.cancel() is State.RUNNING
    assert records.progress({handle.id: (1, 4)}, 30) == [handle.id]


def test_equal_jobs_of_two_callers_share_the_render_and_nothing_else(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    mine = submit_job("a small cat", seed=3, priority=1, metadata={"whose": "mine"})
    theirs = submit_job("a small cat", seed=3, priority=9, metadata={"whose": "theirs"})
    assert mine.id == theirs.id
    # Each message waits with its own priority: the first that is fetched is rendered.
    assert [each["job"]["priority"] for each in messages(client, mine.record().job)] == [9, 1]
    finish(records, storage, theirs.record().job)
    for handle, priority, whose in ((mine, 1, "mine"), (theirs, 9, "theirs")):
        elsewhere = JobHandle(handle.id, handle.submission)
        awaited = asyncio.run(elsewhere.aresult(5))
        for result in (handle.result(5), handle.record(), elsewhere.result(5), awaited):
            assert (result.job.priority, result.job.metadata) == (priority, {"whose": whose})
            assert result.state is State.DONE
    client.flushall()
    assert mine.record().job.metadata == {"whose": "mine"}


def test_a_caller_who_gives_up_leaves_the_job_to_the_other(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    mine, theirs = (submit_job("a small cat", seed=3) for _ in range(2))
    records.claim(theirs.record().job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    assert mine.cancel() is State.CANCELLED
    for ask in (lambda: mine.result(5), lambda: asyncio.run(mine.aresult(5))):
        with pytest.raises(JobCancelledError):
            ask()
    assert repr(mine) == f"JobHandle({mine.id!r}, state='cancelled')"
    assert (mine.progress().state, theirs.state()) == (State.CANCELLED, State.RUNNING)
    finish(records, storage, theirs.record().job)
    assert theirs.result(5).state is State.DONE
    assert (mine.cancel(), mine.state()) == (State.CANCELLED, State.CANCELLED)
    client.delete(job_key(mine.id))
    assert (mine.state(), theirs.state()) == (State.CANCELLED, State.DONE)
    # By its id alone it is the job for all.
    assert JobHandle(mine.id).state() is State.DONE


def test_a_job_by_its_id_is_cancelled_for_all(fleet: Fleet) -> None:
    handles = [submit_job("a small cat", seed=3) for _ in range(2)]
    assert JobHandle(handles[0].id).cancel() is State.CANCELLED
    assert [handle.state() for handle in handles] == [State.CANCELLED] * 2


@pytest.mark.parametrize(
    "uri", ["s3://strangers/secret.png", "s3://x/../../y", "file:///etc/passwd", "\x1b[31m"]
)
def test_a_forged_address_leads_to_the_job_s_own_picture_and_nowhere_else(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    handle = submit_job("a small cat", seed=3)
    finish(records, storage, handle.record().job)
    client.hset(job_key(handle.id), mapping={"uri": uri, "id": "../../x"})
    result = handle.result(5)
    assert result.id == handle.id
    with pytest.warns(UserWarning, match="S3_BUCKET and S3_PREFIX"):
        assert result.data() == storage.get(storage.uri(handle.id, result.job.format))
    with pytest.warns(UserWarning, match="S3_BUCKET and S3_PREFIX") as caught:
        assert f"{storage.uri(handle.id, result.job.format).removeprefix('s3://')}?" in result.url()
    assert "\x1b" not in str(caught[0].message)
    # Without S3_BUCKET the record alone says where the picture is: only what can be this job's is taken.
    monkeypatch.delenv("S3_BUCKET")
    with pytest.raises(UnknownJobError, match="no address of its picture"):
        result.url()
    client.hset(job_key(handle.id), "uri", storage.uri(handle.id, result.job.format))
    assert handle.result(5).data()


def test_a_record_in_the_bucket_that_is_another_job_s_is_no_answer(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    handle = submit_job("a small cat", seed=3)
    record = finish(records, storage, handle.record().job)
    client.flushall()
    for stored in (record.model_copy(update={"id": "../../x"}).model_dump_json().encode(), b"{", b""):
        storage._put(storage._key(handle.id, "json"), stored, "application/json")
        with pytest.raises(UnknownJobError, match="in the bucket cannot be read"):
            handle.record()


def test_progress_has_steps_and_messages_ahead(fleet: Fleet, records: Records, storage: Bucket) -> None:
    submit_job("a small cat", seed=2)
    handle = submit_job("a small cat", seed=3)
    progress = handle.progress()
    assert (progress.state, progress.queued, progress.workers, progress.note) == (State.QUEUED, 2, 1, "")
    assert progress.fraction == 0
    job = handle.record().job
    records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    records.progress({handle.id: (1, 4)}, 30)
    progress = handle.progress()
    assert (progress.state, progress.step, progress.steps, progress.queued) == (State.RUNNING, 1, 4, 0)
    assert progress.fraction == 0.25
    finish(records, storage, job)
    assert handle.progress().fraction == 1


def test_a_worker_that_pauses_does_not_count_as_serving(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.state.records.RECHECK_S", 0.01)
    monkeypatch.setattr("worker.state.awaiting.RECHECK_S", 0.01)
    fleet = session().fleet
    for name in ("a", "b"):
        fleet.announce(
            WorkerInfo(
                name=name, served=ServedModel(name="a/model", revision="r", defaults=SERVED.defaults),
                started_at=1.0, device="", attention="", max_rows=1, versions={}, paused="keys expired",
            )
        )  # fmt: skip
    handle = submit_job("a small cat", model="a/model")
    assert handle.record().job.revision == "r"
    expected = 'The 2 workers that serve the model "a/model" take no jobs at present: `smallcat doctor`'
    assert (handle.progress().note.startswith(expected), handle.progress().workers) == (True, 0)
    with pytest.warns(UserWarning, match=expected), pytest.raises(TimeoutError):
        handle.result(0.2)
    with pytest.warns(UserWarning, match=expected), pytest.raises(TimeoutError):
        asyncio.run(handle.aresult(0.2))
    fleet.announce(fleet.workers()[0].model_copy(update={"paused": ""}))
    assert (handle.progress().note, handle.progress().workers) == ("", 1)


def test_a_job_that_nobody_serves_says_so_everywhere(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.state.records.RECHECK_S", 0.01)
    handle = submit_job("a small cat", model="a/model")
    expected = 'No worker serves the model "a/model"'
    assert (handle.progress().note.startswith(expected), handle.progress().workers) == (True, 0)
    with pytest.warns(UserWarning, match=expected) as caught, pytest.raises(TimeoutError):
        handle.result(0.2)
    assert len(caught) == 1


def test_a_job_for_a_revision_that_is_gone_says_so(client: Redis, fleet: Fleet) -> None:
    handle = submit_job("a small cat")
    fleet.withdraw(WORKER.name)
    assert f"at revision {SERVED.revision}" in handle.progress().note


def test_a_served_job_warns_of_nothing(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.state.records.RECHECK_S", 0.01)
    handle = submit_job("a small cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TimeoutError):
            handle.result(0.2)


def test_a_handle_works_in_another_process_by_its_id(
    fleet: Fleet, records: Records, storage: Bucket, environment: dict[str, str]
) -> None:
    handle = submit_job("a small cat", seed=3)
    finish(records, storage, handle.record().job)
    code = f"from producer import JobHandle; print(JobHandle({handle.id!r}).result(5).uri)"
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert shown.stdout.strip() == storage.uri(handle.id, job_of(3).format)


def test_a_record_that_expired_is_read_from_the_bucket(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    handle = submit_job("a small cat", seed=3)
    finish(records, storage, handle.record().job)
    client.flushall()
    assert handle.state() is State.DONE
    assert handle.result(5).seed == 3
    assert handle.progress().fraction == 1
    assert np.array_equal(np.asarray(handle.image(5)), picture_of(job_of(3)).pixels)


@pytest.mark.parametrize("fields", [{}, {"prompt_syntax": "plain"}, {"prompt_syntax": "a1111"}])
@pytest.mark.parametrize("is_done", [False, True])
def test_a_job_as_it_is_shown_is_the_same_job_under_any_default_of_the_fleet(
    fleet: Fleet, records: Records, storage: Bucket, fields: JobFields, is_done: bool
) -> None:
    handle = submit_job("a (cat:1.3)", seed=3, **fields)
    if is_done:
        finish(records, storage, handle.record().job)
    result = handle.record()
    shown = (
        *(result.job.model_dump(), result.model_dump()["job"], result.model_dump(mode="json")["job"]),
        *(json.loads(result.model_dump_json())["job"], view(result, handle.submission, ANYBODY)["job"]),
        view(result, "", Caller("somebody", frozenset({"read"})))["job"],
    )
    for default in PromptSyntax:
        for values in shown:
            assert Job.parse(values).in_syntax(default).id == handle.id
        assert result.job.in_syntax(default).id == handle.id


def test_a_submission_that_is_not_known_shows_nothing_of_others(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    handle = submit_job("a small cat", seed=3, metadata={"who": "Jones"}, priority=7)
    assert JobHandle(handle.id, handle.submission).record().job.metadata == {"who": "Jones"}
    finish(records, storage, handle.record().job)
    for _ in range(2):
        other = JobHandle(handle.id, "0" * 16).record().job
        assert (other.metadata, other.priority) == ({}, 5)
        client.flushall()
    assert handle.record().job.metadata == {"who": "Jones"}


def test_a_record_in_the_bucket_without_its_picture_is_no_done_job(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis
) -> None:
    handle = submit_job("a small cat", seed=3)
    job = handle.record().job
    finish(records, storage, job)
    stored = storage.record(job.id)
    assert stored is not None
    storage.delete(job.id, job.format)
    storage._put(storage._key(job.id, "json"), stored, "application/json")
    client.flushall()
    with pytest.raises(UnknownJobError):
        handle.state()


@pytest.mark.parametrize("job_id", ["0" * 32, "nonsense", "", "../../x", "a b", "ä", "0" * 5_000])
def test_an_unknown_job_is_reported_so(environment: dict[str, str], job_id: str) -> None:
    handle = JobHandle(job_id)
    for ask in (handle.state, handle.progress, handle.cancel, lambda: handle.result(1), handle.image):
        with pytest.raises(UnknownJobError):
            ask()


def test_without_a_bucket_an_unknown_job_is_unknown(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("S3_BUCKET")
    with pytest.raises(UnknownJobError):
        JobHandle("0" * 32).state()


def test_a_picture_that_was_deleted_is_reported_so(fleet: Fleet, records: Records, storage: Bucket) -> None:
    handle = submit_job("a small cat", seed=3)
    job = handle.record().job
    finish(records, storage, job)
    storage.delete(job.id, job.format)
    with pytest.raises(UnknownJobError, match="Nothing is at s3://"):
        handle.image(5)


def test_many_threads_may_submit(fleet: Fleet, client: Redis) -> None:
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(lambda seed: submit_job("a small cat", seed=seed), range(64)))
    assert len({handle.id for handle in handles}) == 64
    assert len(messages(client, handles[0].record().job)) == 64


# --- repr -------------------------------------------------------------------------------------------------


def test_a_handle_shows_its_state(fleet: Fleet, records: Records, storage: Bucket) -> None:
    handle = submit_job("a small cat", seed=3)
    assert repr(handle) == f"JobHandle('{handle.id}', state='queued')"
    finish(records, storage, handle.record().job)
    assert repr(handle) == f"JobHandle('{handle.id}', state='done')"


@pytest.mark.parametrize("job_id", ["0" * 32, "nonsense", "", "a\nb"])
def test_a_handle_of_an_unknown_job_says_so(environment: dict[str, str], job_id: str) -> None:
    assert repr(JobHandle(job_id)) == f"JobHandle({job_id!r}, state='unknown')"


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which no Redis was silent yet."""
    monkeypatch.setattr("producer.client.short_look_up", ShortLookUp())


@pytest.mark.usefixtures("forgetful")
def test_a_handle_is_shown_in_time_although_redis_is_away(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "600")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{held.getsockname()[1]}/0")
        with soon(1):
            assert repr(JobHandle("x")) == "JobHandle('x', state='unknown')"


@pytest.mark.usefixtures("forgetful")
def test_handles_are_shown_in_time_although_redis_is_frozen(
    new_stack: Callable[..., Stack], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of a thousand handles takes no longer than one."""
    valkey = new_stack(workers=0).valkey
    monkeypatch.setenv("REDIS_URL", valkey.url)
    handle = submit_job("a small cat", seed=1)
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        with soon(1):
            shown = repr([handle] * 1_000)
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    assert shown.count("state='unknown'") == 1_000


@pytest.mark.usefixtures("forgetful")
def test_a_handle_is_shown_in_time_although_a_name_is_looked_up_for_long(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://nowhere.invalid:6379/0")
    resolved = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: resolved.wait(20) and [])
    try:
        with soon(1):
            assert repr(JobHandle("x")) == "JobHandle('x', state='unknown')"
    finally:
        resolved.set()


def test_a_handle_is_shown_although_a_setting_is_wrong(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "soon")
    assert repr(JobHandle("x")) == "JobHandle('x', state='unknown')"


def test_many_threads_show_a_handle(fleet: Fleet) -> None:
    handle = submit_job("a small cat", seed=3)
    with ThreadPoolExecutor(8) as pool:
        shown = set(pool.map(lambda _: repr(handle), range(64)))
    assert shown == {f"JobHandle('{handle.id}', state='queued')"}


def test_a_result_is_shown_in_one_line(fleet: Fleet, records: Records, storage: Bucket) -> None:
    handle = submit_job("a small cat\nwith a hat", seed=3)
    record = finish(records, storage, handle.record().job)
    result = JobResult.of(record.model_copy(update={"timings": Timings(queued=0.25, rendered=1.5)}))
    assert (
        repr(result)
        == str(result)
        == (f"JobResult('{handle.id}', state='done', uri='{record.uri}', seed=3, size='64x64', seconds=1.75)")
    )


def test_a_result_that_has_no_picture_is_shown_in_one_line(fleet: Fleet) -> None:
    result = submit_job("a small cat", seed=3, model="a/model").record()
    assert repr(result) == (
        f"JobResult('{result.id}', state='queued', uri=None, seed=3, size=None, seconds=0.0)"
    )
