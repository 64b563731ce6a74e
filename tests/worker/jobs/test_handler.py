"""The way of one job through a worker: real Redis, real bucket, the real engine; only the model is a fake."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from tests.conftest import EmptyBucket
from tests.worker.engine.fake_runner import SERVED, SOON_S, FakeRunner, FakeState, Faults, job_of, picture_of
from tests.worker.jobs.test_heartbeat import until_true
from worker.contract import infotext
from worker.contract.choices import ImageFormat
from worker.contract.errors import (
    BucketRefusedError,
    DeviceError,
    EngineFailedError,
    EngineStoppedError,
    InvalidJobError,
    JobCancelledError,
    MachineError,
    MissingFileError,
    NewerMessageError,
    NotFiniteError,
    PermanentStorageError,
    RenderError,
    StorageError,
    UnknownModelError,
)
from worker.contract.file_index import NO_FILES, FileEntry, FileIndex, Kind
from worker.contract.job import FORMAT_VERSION, Job
from worker.contract.job_files import with_files
from worker.contract.message import payload_of
from worker.contract.metadata.job_from_image import read_infotext
from worker.contract.queues import queue_of
from worker.contract.record import JobRecord, State
from worker.engine.engine import Engine
from worker.jobs import metrics
from worker.jobs.handler import WAITING_DELAY_S, Handled, JobHandler
from worker.jobs.in_flight import JobsInFlight
from worker.jobs.retry_policy import Backoff
from worker.state.failures import Failures
from worker.state.hashes import record_of
from worker.state.keys import attempts_key, job_key
from worker.state.records import Records
from worker.state.redis_client import RedisError, connect
from worker.storage.bucket import Bucket


class FlakyBucket(Bucket):
    """The real bucket behind a service that fails as often as a test says."""

    def __init__(self, bucket: str) -> None:
        super().__init__(bucket)
        #: What the next calls of `find` and `put` raise, in turn.
        self.find_errors: list[StorageError] = []
        self.put_errors: list[StorageError] = []
        self.failed = threading.Event()
        #: What every test object gets, and their sizes so far.
        self.probe_error: StorageError | None = None
        self.probed: list[int] = []

    def probe(self, size: int = 8, look: Any = lambda uri: None) -> tuple[str, ...]:
        self.probed.append(size)
        if self.probe_error is not None:
            raise self.probe_error
        return super().probe(size)

    def find(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        self._fail(self.find_errors)
        return super().find(job_id, image_format, tenant)

    def put(
        self,
        job_id: str,
        image_format: ImageFormat,
        picture: bytes,
        record: bytes,
        mime: str,
        tenant: str = "",
    ) -> None:
        self._fail(self.put_errors)
        super().put(job_id, image_format, picture, record, mime, tenant)

    def _fail(self, errors: list[StorageError]) -> None:
        if errors:
            self.failed.set()
            raise errors.pop(0)


class Worker:
    """A worker process without Celery. Used as a context, which stops it."""

    def __init__(self, client: Redis, storage: FlakyBucket, name: str = "w1", **options: Any) -> None:
        self.runner = FakeRunner()
        self.engine: Engine[FakeState] = Engine(self.runner, job_timeout_s=600, on_failure=lambda error: None)
        self.records = Records(client, 1_000)
        self.storage = storage
        given = {"lease_s": 30.0, "max_attempts": 3, "upload_timeout_s": 60.0} | options
        self.handler = JobHandler(
            name=name, served=SERVED, engine=self.engine, records=self.records, bucket=storage, **given
        )
        self._pool = ThreadPoolExecutor(8)

    def submit(self, job: Job) -> None:
        self.records.submitted(job, queue_of(job))

    def begin(self, job: Job, message_id: str = "m1", **options: Any) -> Future[float | None]:
        """Handle a message for `job` on a thread of the pool: seconds until it comes back."""

        def handle() -> float | None:
            return self.handler.handle(payload_of(job), message_id, **options).delay_s

        return self._pool.submit(handle)

    def handle(self, job: Job, message_id: str = "m1", **options: Any) -> float | None:
        return self.begin(job, message_id, **options).result(SOON_S)

    def opened(self) -> None:
        """Wait until the bucket has taken a test object."""
        for thread in threading.enumerate():
            if thread.name == "bucket access":
                thread.join(SOON_S)
        assert self.handler.access.reason == ""

    def __enter__(self) -> Worker:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.gate.set()
        self.engine.stop()
        self.handler.stop()
        self._pool.shutdown()
        assert self.handler.progress() == {}, "nothing stays in flight"


@pytest.fixture
def client(valkey: Any) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def storage(s3_environment: EmptyBucket, monkeypatch: pytest.MonkeyPatch) -> FlakyBucket:
    monkeypatch.setattr("worker.jobs.storage_retry.STORAGE_BACKOFF", Backoff(0.001, 0.002))
    return FlakyBucket(s3_environment.name)


@pytest.fixture
def worker(client: Redis, storage: FlakyBucket) -> Iterator[Worker]:
    with Worker(client, storage) as worker:
        yield worker


JOB = job_of(5, metadata={"mine": 1}, priority=7)


def test_what_is_only_drawn_as_words_is_in_the_record(worker: Worker) -> None:
    job = job_of(5).model_copy(update={"prompt": "a (red:1.3) cat AND a dog"})
    worker.submit(job)
    assert worker.handle(job) is None
    [warning] = worker.records.get(job.id).warnings
    assert warning.startswith("(red:1.3), AND in the prompt")


def test_a_tenants_picture_is_in_its_own_folder_and_answers_nobody_elses_job(worker: Worker) -> None:
    jobs = [job_of(5, **fields) for fields in ({}, {"tenant": "acme"}, {"tenant": "acme-2"})]
    for job in jobs:
        worker.submit(job)
        worker.handle(job, f"m{job.tenant}")
    records = [worker.records.get(job.id) for job in jobs]
    assert [(record.state, record.cached) for record in records] == [(State.DONE, False)] * 3
    for job, record in zip(jobs, records, strict=True):
        assert record.uri == worker.storage.uri(job.id, job.format, job.tenant)
        assert json.loads(worker.storage.record(job.id, job.tenant) or b"")["id"] == job.id
    assert worker.storage.record(jobs[1].id) is None


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_job_goes_all_the_way(worker: Worker, image_format: str) -> None:
    job = job_of(5, format=image_format, metadata={"mine": 1})
    worker.runner.warnings[5] = ("The prompt was cut.",)
    worker.submit(job)
    assert worker.handle(job) is None
    record = worker.records.get(job.id)
    assert (record.state, record.job, record.cached) == (State.DONE, job, False)
    assert (record.step, record.steps, record.attempts, record.worker) == (4, 4, 1, "w1")
    assert record.warnings == ("The prompt was cut.",)
    assert record.timings.queued is not None
    assert record.timings.rendered is not None
    assert record.timings.uploaded is not None
    assert record.uri == worker.storage.uri(job.id, job.format)

    data = worker.storage.get(record.uri)
    with Image.open(io.BytesIO(data)) as image:
        assert np.abs(np.asarray(image).astype(int) - picture_of(job).pixels).max() <= 1
    # The picture's own infotext is the job.
    assert infotext.read(read_infotext(data) or "").id == job.id

    lasting = json.loads(worker.storage.record(job.id) or b"{}")
    assert Job.parse(lasting["job"]) == job
    assert (lasting["id"], lasting["state"], lasting["uri"]) == (job.id, "done", record.uri)


@pytest.mark.parametrize("is_marked", [True, False])
def test_the_setting_says_whether_pictures_are_marked_and_stored_ones_stay(
    client: Redis, storage: FlakyBucket, is_marked: bool
) -> None:
    with Worker(client, storage, mark_as_generated=is_marked) as worker:
        worker.handle(JOB)
        data = storage.get(worker.records.get(JOB.id).uri or "")
        assert (b"trainedAlgorithmicMedia" in data) is is_marked
    client.flushdb()
    with Worker(client, storage, mark_as_generated=not is_marked) as worker:
        worker.handle(JOB)
        assert worker.records.get(JOB.id).cached
        assert storage.get(worker.records.get(JOB.id).uri or "") == data


def test_a_job_whose_object_is_there_is_answered_from_it_without_rendering(
    worker: Worker, client: Redis
) -> None:
    worker.runner.warnings[5] = ("The prompt was cut.",)
    worker.handle(JOB)
    client.flushall()
    again = JOB.model_copy(update={"metadata": {"another": 2}, "priority": 1})
    worker.submit(again)
    worker.handle(again, "m2")
    record = worker.records.get(JOB.id)
    assert (record.state, record.cached, record.attempts) == (State.DONE, True, 1)
    assert (record.job.metadata, record.job.priority) == ({"another": 2}, 1)
    assert record.warnings == ("The prompt was cut.",)
    assert record.uri == worker.storage.uri(JOB.id, JOB.format)
    assert (record.step, record.steps) == (4, 4)
    assert worker.runner.prepared == [5]


def test_a_record_that_cannot_be_read_is_made_again(worker: Worker, client: Redis) -> None:
    worker.storage.put(JOB.id, JOB.format, b"picture", b"{not json", "image/png")
    worker.handle(JOB)
    assert worker.records.get(JOB.id).state is State.DONE
    assert worker.storage.get(worker.storage.uri(JOB.id, JOB.format)) != b"picture"
    assert JobRecord.model_validate_json(worker.storage.record(JOB.id) or b"").job == JOB


@pytest.mark.parametrize(
    "forged",
    [
        {"id": "0" * 32},
        {"state": State.FAILED},
        {"job": job_of(6)},
        {"job": JOB.model_copy(update={"revision": "e" * 40})},
    ],
    ids=["id", "state", "job", "revision"],
)
def test_a_record_beside_the_picture_that_is_another_job_s_answers_nothing(
    worker: Worker, client: Redis, forged: dict[str, object]
) -> None:
    worker.handle(JOB)
    stored = JobRecord.model_validate_json(worker.storage.record(JOB.id) or b"")
    record = stored.model_copy(update=forged).model_dump_json().encode()
    worker.storage.put(JOB.id, JOB.format, b"another picture", record, "image/png")
    client.flushall()
    worker.submit(JOB)
    worker.handle(JOB, "m2")
    assert (worker.records.get(JOB.id).state, worker.records.get(JOB.id).cached) == (State.DONE, False)
    assert worker.storage.get(worker.storage.uri(JOB.id, JOB.format)) != b"another picture"


def test_two_messages_for_one_job_are_one_render(worker: Worker) -> None:
    worker.runner.gate.clear()
    worker.submit(JOB)
    first = worker.begin(JOB, "m1")
    assert worker.runner.entered.wait(SOON_S)
    assert worker.handle(JOB, "m2") is None
    assert not first.done()
    worker.runner.gate.set()
    first.result(SOON_S)
    assert worker.records.get(JOB.id).state is State.DONE
    assert worker.handle(JOB, "m3") is None
    assert worker.runner.prepared == [5]


def test_two_workers_with_a_message_each_make_one_render(
    worker: Worker, client: Redis, storage: FlakyBucket
) -> None:
    with Worker(client, storage, "w2") as other:
        worker.runner.gate.clear()
        first = worker.begin(JOB, "m1")
        assert worker.runner.entered.wait(SOON_S)
        assert other.handle(JOB, "m2") is None
        worker.runner.gate.set()
        first.result(SOON_S)
        assert other.runner.prepared == []


def test_a_message_that_comes_again_while_it_is_handled_joins(worker: Worker) -> None:
    """As when Redis was out of reach for longer than the lease."""
    worker.runner.gate.clear()
    first = worker.begin(JOB, "m1")
    assert worker.runner.entered.wait(SOON_S)
    second = worker.begin(JOB, "m1", redelivered=True)
    worker.runner.gate.set()
    assert (first.result(SOON_S), second.result(SOON_S)) == (None, None)
    assert worker.records.get(JOB.id).state is State.DONE
    assert len(worker.runner.prepared) <= 2


# --- cancelled --------------------------------------------------------------------------------------------


def test_a_job_cancelled_in_the_queue_is_not_rendered(worker: Worker) -> None:
    worker.submit(JOB)
    worker.records.cancel(JOB.id)
    assert worker.handle(JOB) is None
    assert worker.records.get(JOB.id).state is State.CANCELLED
    assert worker.runner.prepared == []


def test_a_job_cancelled_while_it_runs_stops_at_its_next_step(worker: Worker) -> None:
    worker.runner.gate.clear()
    other = job_of(6)
    futures = [worker.begin(JOB, "m1"), worker.begin(other, "m2")]
    assert worker.runner.entered.wait(SOON_S)
    worker.records.cancel(JOB.id)
    worker.handler.cancel(JOB.id)  # As the heartbeat does.
    worker.runner.gate.set()
    assert [future.result(SOON_S) for future in futures] == [None, None]
    assert worker.records.get(JOB.id).state is State.CANCELLED
    assert worker.storage.find(JOB.id, JOB.format) is None
    assert worker.records.get(other.id).state is State.DONE


def test_a_message_whose_job_begins_with_a_picture_that_is_not_done_comes_back(
    worker: Worker, client: Redis
) -> None:
    parent = job_of(71, width=64, height=64)
    child = Job.parse(job_of(72).model_dump() | {"width": 64, "height": 64, "image": f"job:{parent.id}:8x8"})
    worker.submit(parent)
    assert worker.handle(child) == WAITING_DELAY_S
    assert worker.handle(parent, "m2") is None
    # A record that denies it changes nothing: the bucket has the picture.
    client.hset(job_key(parent.id), "state", "queued")
    assert worker.handle(child) is None
    assert worker.records.get(child.id).state is State.DONE


@pytest.mark.parametrize("where", ["find_errors", "put_errors"])
def test_a_job_cancelled_while_it_waits_for_the_storage_ends_at_once(
    client: Redis, storage: FlakyBucket, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("worker.jobs.storage_retry.STORAGE_BACKOFF", Backoff(600.0, 600.0))
    with Worker(client, storage, upload_timeout_s=10_000.0) as worker:
        setattr(storage, where, [StorageError("503")])
        worker.submit(JOB)
        future = worker.begin(JOB)
        assert storage.failed.wait(SOON_S)
        assert worker.records.cancel(JOB.id) is State.RUNNING
        worker.handler.cancel(JOB.id)
        assert future.result(SOON_S) is None
        assert worker.records.get(JOB.id).state is State.CANCELLED
        assert storage.find(JOB.id, JOB.format) is None
        # Whoever submits it again wants it.
        worker.submit(JOB)
        assert worker.handle(JOB, "m2") is None
        assert worker.records.get(JOB.id).state is State.DONE


def test_a_job_that_is_submitted_again_while_its_render_is_stopped_is_rendered(worker: Worker) -> None:
    """Whoever gave it up is not who wants it now, although both share a render of one worker."""
    worker.runner.gate.clear()
    worker.records.submitted(JOB, queue_of(JOB), "a")
    first = worker.begin(JOB, "m1")
    assert worker.runner.entered.wait(SOON_S)
    assert worker.records.cancel(JOB.id, "a") is State.RUNNING
    worker.records.submitted(JOB, queue_of(JOB), "b")
    second = worker.begin(JOB, "m2")
    until_true(lambda: worker.records.get(JOB.id).state is State.RUNNING)
    worker.handler.cancel(JOB.id)  # The word of the first cancellation comes late.
    worker.runner.gate.set()
    assert first.result(SOON_S) is None
    if second.result(SOON_S) is not None:  # Back to its queue.
        worker.handle(JOB, "m2", redelivered=True)
    assert worker.records.get(JOB.id, "b").state is State.DONE
    assert worker.records.get(JOB.id, "a").state is State.CANCELLED


def test_a_job_is_in_flight_until_the_last_of_its_messages_is_done() -> None:
    jobs = JobsInFlight()
    with jobs.hold("a"):
        with jobs.hold("a"):
            pass
        assert jobs.progress({}) == {"a": (0, 0)}
        jobs.cancel("a")
        with pytest.raises(JobCancelledError):
            jobs.check("a")
    assert jobs.progress({}) == {}


def test_cancelling_a_job_that_is_not_in_flight_does_nothing(worker: Worker) -> None:
    worker.handler.cancel(JOB.id)
    assert worker.handle(JOB) is None
    assert worker.records.get(JOB.id).state is State.DONE


# --- failures of the job ----------------------------------------------------------------------------------


def test_a_job_that_fails_is_tried_again_and_then_set_aside(worker: Worker, client: Redis) -> None:
    worker.runner.faults[5] = Faults(outcome={1: NotFiniteError("NaN at step 1")})
    worker.submit(JOB)
    pauses = [worker.handle(JOB) for _ in range(3)]
    assert pauses[0] is not None
    assert pauses[1] is not None
    assert 0 < pauses[0] < pauses[1] * 2
    assert pauses[2] is None
    record = worker.records.get(JOB.id)
    assert (record.state, record.error_type, record.error) == (
        State.FAILED,
        "NotFiniteError",
        "NaN at step 1",
    )
    assert record.attempts == 3
    assert [failure.id for failure in Failures(client).list()] == [JOB.id]
    assert worker.storage.record(JOB.id) is None


def test_a_job_that_fails_once_is_done_at_its_next_attempt(worker: Worker) -> None:
    worker.runner.faults[5] = Faults(batch={0: RuntimeError("a cosmic ray")})
    assert worker.handle(JOB) is not None
    assert worker.records.get(JOB.id).state is State.QUEUED
    worker.runner.faults.clear()
    assert worker.handle(JOB, redelivered=True) is None
    record = worker.records.get(JOB.id)
    assert (record.state, record.attempts, record.error) == (State.DONE, 2, None)
    assert "a cosmic ray" in (record.tries[0].error or "")


def test_what_an_encoder_raises_is_the_jobs_own_failure(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object, **__: object) -> bytes:
        raise ValueError("EXIF data is too long")

    monkeypatch.setattr("worker.jobs.handler.encode", encode)
    for _ in range(3):
        worker.handle(JOB)
    record = worker.records.get(JOB.id)
    assert (record.state, record.error_type) == (State.FAILED, RenderError.__name__)
    assert "EXIF data is too long" in (record.error or "")


def test_a_picture_in_the_bucket_answers_a_job_whose_attempts_are_used_up(
    worker: Worker, client: Redis
) -> None:
    """Each worker died after it had put the picture, or Redis lost that the job was done."""
    worker.handle(JOB)
    client.delete(job_key(JOB.id))
    worker.submit(JOB)
    for _ in range(3):
        worker.records.claim(JOB, "m2", worker="dead", lease_s=30, max_attempts=3, queue="q")
    assert worker.handle(JOB, "m2", redelivered=True) is None
    record = worker.records.get(JOB.id)
    assert (record.state, record.cached, record.error) == (State.DONE, True, None)


def test_who_acknowledges_is_told_which_record_says_so(worker: Worker, client: Redis) -> None:
    payload = payload_of(JOB)
    records = job_key(JOB.id), attempts_key(JOB.id)
    assert worker.handler.handle(payload, "m1") == Handled(records, is_done=True)
    assert worker.handler.handle(payload, "m2") == Handled(records)
    client.hset("smallcat:run:r", mapping={"fed": 1, "ttl": 60, "cancelled": 1})
    other = job_of(6)
    run = payload_of(other) | {"run": "r:0:0:0:1"}
    assert worker.handler.handle(run, "m3") == Handled(None)
    assert not client.exists(job_key(other.id))


def test_a_job_that_was_in_flight_at_every_death_is_poison(worker: Worker, client: Redis) -> None:
    worker.submit(JOB)
    for _ in range(3):  # As by workers that were killed.
        worker.records.claim(JOB, "m1", worker="dead", lease_s=30, max_attempts=3, queue="q")
    assert worker.handle(JOB, redelivered=True) is None
    record = worker.records.get(JOB.id)
    assert (record.state, record.error_type) == (State.FAILED, "PoisonJobError")
    assert "SMALLCAT_MAX_ATTEMPTS" in (record.error or "")
    assert worker.runner.prepared == []


@pytest.mark.parametrize(
    "job",
    [
        job_of(5).model_copy(update={"revision": "e" * 40}),
        job_of(5).model_copy(update={"model": "another", "revision": "e" * 40}),
        Job(prompt="x", seed=5, model="another").opened(),
    ],
    ids=["revision", "model", "open"],
)
def test_a_job_for_another_model_is_never_answered_with_this_ones_picture(worker: Worker, job: Job) -> None:
    worker.submit(job)
    assert worker.handle(job) is None
    record = worker.records.get(job.id)
    assert (record.state, record.error_type) == (State.FAILED, UnknownModelError.__name__)
    assert worker.runner.prepared == []


@pytest.mark.parametrize("model", ["default", SERVED.name])
def test_a_job_sent_before_any_worker_was_up_is_rendered_under_its_own_id(worker: Worker, model: str) -> None:
    job = Job(prompt="x", seed=5, model=model).opened()
    worker.submit(job)
    worker.handle(job)
    record = worker.records.get(job.id)
    assert (record.state, record.id) == (State.DONE, job.id)
    assert (record.job.model, record.job.revision, record.job.steps) == (SERVED.name, SERVED.revision, 4)
    assert worker.storage.find(job.id, job.format) is not None


# --- failures of the storage ------------------------------------------------------------------------------


def test_a_storage_that_fails_for_a_while_costs_no_render(worker: Worker) -> None:
    worker.storage.find_errors = [StorageError("503")] * 3
    worker.storage.put_errors = [StorageError("503")] * 3
    assert worker.handle(JOB) is None
    assert worker.records.get(JOB.id).state is State.DONE
    assert worker.runner.steps_done[5] == 4
    assert worker.storage.find(JOB.id, JOB.format) is not None


def test_progress_is_reported_while_the_picture_waits_for_the_storage(worker: Worker) -> None:
    worker.storage.put_errors = [StorageError("503")] * 100_000
    future = worker.begin(JOB)
    assert worker.storage.failed.wait(SOON_S)
    assert worker.handler.progress() == {JOB.id: (4, 4)}
    worker.storage.put_errors.clear()
    assert future.result(SOON_S) is None


REFUSAL = PermanentStorageError("The bucket refuses (AccessDenied): give these keys their rights.")


@pytest.mark.parametrize("where", ["find_errors", "put_errors"])
def test_a_job_that_is_refused_while_test_objects_are_taken_fails_alone(worker: Worker, where: str) -> None:
    setattr(worker.storage, where, [REFUSAL] * 3)
    assert worker.handle(JOB) is None
    record = worker.records.get(JOB.id)
    assert record.state is State.FAILED
    with pytest.raises(PermanentStorageError, match="give these keys their rights"):
        record.raise_for_state()
    assert len(worker.runner.prepared) == (where == "put_errors")
    assert worker.handle(job_of(6), "m2") is None
    assert worker.records.get(job_of(6).id).state is State.DONE


@pytest.mark.parametrize("where", ["find_errors", "put_errors"])
def test_a_refusal_that_passes_while_test_objects_are_taken_costs_no_job(worker: Worker, where: str) -> None:
    """A new policy reaches the servers of S3 one after the other."""
    setattr(worker.storage, where, [REFUSAL] * 2)
    assert worker.handle(JOB) is None
    assert worker.records.get(JOB.id).state is State.DONE


@pytest.mark.parametrize("where", ["find_errors", "put_errors"])
def test_while_the_bucket_refuses_all_jobs_go_back_and_are_done_when_it_takes_them(
    worker: Worker, where: str
) -> None:
    worker.submit(JOB)
    worker.storage.probe_error = REFUSAL
    setattr(worker.storage, where, [REFUSAL])
    with pytest.raises(BucketRefusedError):
        worker.handle(JOB)
    record = worker.records.get(JOB.id)
    assert (record.state, record.attempts) == (State.QUEUED, 0)
    assert worker.handler.access.reason == str(REFUSAL)
    prepared = list(worker.runner.prepared)
    # What was fetched at that moment goes back untouched.
    with pytest.raises(BucketRefusedError):
        worker.handle(job_of(6), "m2")
    assert worker.runner.prepared == prepared
    worker.storage.probe_error = None
    worker.opened()
    assert worker.handle(JOB, redelivered=True) is None
    assert (worker.records.get(JOB.id).state, worker.records.get(JOB.id).attempts) == (State.DONE, 1)


def test_a_job_that_is_refused_while_the_storage_fails_is_tried_until_somebody_can_tell(
    worker: Worker,
) -> None:
    worker.storage.put_errors = [REFUSAL]
    worker.storage.probe_error = StorageError("503")
    assert worker.handle(JOB) is None
    assert worker.records.get(JOB.id).state is State.DONE
    assert worker.handler.access.reason == ""


def test_a_picture_that_is_refused_is_judged_by_an_object_as_large(worker: Worker) -> None:
    worker.storage.put_errors = [REFUSAL]
    worker.handle(JOB)
    picture = worker.storage.get(worker.storage.uri(JOB.id, JOB.format))
    assert worker.storage.probed == [len(picture)]


@pytest.mark.parametrize("where", ["find_errors", "put_errors"])
def test_a_storage_that_fails_for_too_long_fails_the_job(
    client: Redis, storage: FlakyBucket, where: str
) -> None:
    with Worker(client, storage, upload_timeout_s=0.02) as worker:
        setattr(storage, where, [StorageError("503")] * 100_000)
        assert worker.handle(JOB) is None
        record = worker.records.get(JOB.id)
        assert (record.state, record.error_type) == (State.FAILED, "StorageError")
        assert "0.02 s (SMALLCAT_UPLOAD_TIMEOUT_S): 503" in (record.error or "")


@pytest.mark.parametrize("where", ["find_errors", "put_errors"])
def test_stopping_gives_back_a_job_that_waits_for_the_storage(worker: Worker, where: str) -> None:
    worker.submit(JOB)
    setattr(worker.storage, where, [StorageError("503")] * 100_000)
    future = worker.begin(JOB)
    assert worker.storage.failed.wait(SOON_S)
    worker.handler.stop()
    assert isinstance(future.exception(SOON_S), EngineStoppedError)
    assert (worker.records.get(JOB.id).state, worker.records.get(JOB.id).attempts) == (
        State.QUEUED,
        0,
    )


def test_stopping_gives_back_a_job_that_is_rendered(worker: Worker) -> None:
    worker.submit(JOB)
    worker.runner.gate.clear()
    future = worker.begin(JOB)
    assert worker.runner.entered.wait(SOON_S)
    stop = threading.Thread(target=worker.engine.stop)
    stop.start()
    assert isinstance(future.exception(SOON_S), EngineStoppedError)
    worker.runner.gate.set()
    stop.join(SOON_S)
    record = worker.records.get(JOB.id)
    assert (record.state, record.attempts, record.tries) == (State.QUEUED, 0, ())


def break_engine(worker: Worker, fault: BaseException) -> None:
    """Let the engine's loop end with `fault` in its next step."""

    def step(states: object) -> list[None]:
        if isinstance(fault, MachineError):
            raise fault
        return []  # One outcome a job is what the loop expects.

    worker.runner.step = step  # type: ignore[assignment]


def fail_engines(client: Redis, storage: FlakyBucket, fault: BaseException, most: int) -> list[JobRecord]:
    """The job's record after each worker whose engine it broke, until no worker has it any more."""
    records: list[JobRecord] = []
    while len(records) < most:
        with Worker(client, storage) as worker:
            break_engine(worker, fault)
            worker.submit(JOB)
            begun = worker.begin(JOB, redelivered=bool(records))
            is_over = begun.exception(SOON_S) is None
            records.append(worker.records.get(JOB.id))
            if is_over:
                return records
            assert isinstance(begun.exception(), EngineFailedError)
            assert records[-1].state is State.QUEUED
    return records


def test_a_job_that_breaks_the_engine_each_time_is_poison(client: Redis, storage: FlakyBucket) -> None:
    """As one that kills its worker each time."""
    *queued, last = fail_engines(client, storage, ValueError("a bug"), 9)
    assert [record.attempts for record in queued] == [1, 2, 3]
    assert (last.state, last.error_type, last.attempts) == (State.FAILED, "PoisonJobError", 3)
    assert [attempt.error_type for attempt in last.tries] == ["EngineFailedError"] * 3
    assert "ValueError" in (last.tries[0].error or "")


def test_a_job_under_which_devices_fail_uses_up_attempts_only_alone(
    client: Redis, storage: FlakyBucket
) -> None:
    *queued, last = fail_engines(client, storage, DeviceError("illegal memory access"), 9)
    assert [record.attempts for record in queued] == [0, 0, 1, 2, 3]
    assert (last.state, last.error_type, last.attempts) == (State.FAILED, "PoisonJobError", 3)


def test_a_job_that_was_in_a_broken_engine_is_done_by_another(client: Redis, storage: FlakyBucket) -> None:
    fail_engines(client, storage, ValueError("a bug"), 2)
    with Worker(client, storage) as worker:
        assert worker.handle(JOB, redelivered=True) is None
        record = worker.records.get(JOB.id)
    assert (record.state, record.attempts) == (State.DONE, 3)


# --- failures of Redis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["claim", "done"])
def test_an_attempt_that_ends_in_an_error_of_redis_does_not_count(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """However often: it is not the job's fault. A claim may have been written all the same."""
    worker.submit(JOB)
    original = getattr(worker.records, call)

    def fail(*args: Any, **options: Any) -> None:
        if call == "claim":
            original(*args, **options)
        raise RedisError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(worker.records, call, fail)
        for _ in range(5):
            with pytest.raises(RedisError, match="no answer"):
                worker.handle(JOB, redelivered=True)
            record = worker.records.get(JOB.id)
            assert (record.state, record.attempts, record.tries) == (State.QUEUED, 0, ())
    assert worker.handle(JOB, redelivered=True) is None
    record = worker.records.get(JOB.id)
    assert (record.state, record.attempts) == (State.DONE, 1)
    assert worker.runner.prepared == [5]


# --- messages ---------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], Any]) -> Any:
    message: dict[str, Any] = json.loads(json.dumps(payload_of(JOB)))
    return change(message) or message


MALFORMED: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "a text": "render",
    "empty": {},
    "no version": changed(lambda message: message.pop("version") and None),
    "no number as version": changed(lambda message: message.update(version="one")),
    "another job's id": changed(lambda message: message.update(id="0" * 32)),
    "an unknown field": changed(lambda message: message.update(callback="http://x")),
    "no job": changed(lambda message: message.update(job=None)),
    "a job past its limits": changed(lambda message: message["job"].update(steps=10**6)),
    "a job with an unknown field": changed(lambda message: message["job"].update(path="/etc/passwd")),
    "a lone surrogate": changed(lambda message: message["job"].update(prompt="\ud800")),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_job_is_refused_and_leaves_nothing(worker: Worker, client: Redis, what: str) -> None:
    with pytest.raises(InvalidJobError, match="A message"):
        worker.handler.handle(MALFORMED[what], "m1")
    assert client.dbsize() == 0
    assert worker.runner.prepared == []


def test_a_stored_job_that_no_model_can_draw_fails_alone_with_a_sentence(worker: Worker) -> None:
    """An earlier version took it while no worker had announced the model, and so its steps."""
    fields = {"prompt": "a cat", "seed": 1, "upscale": 2, "upscale_strength": 0}
    job = Job.parse(fields, is_new=False).opened()
    worker.submit(job)
    assert worker.handle(job) is None
    record = worker.records.get(job.id)
    assert (record.state, record.attempts, record.job) == (State.FAILED, 1, job)
    with pytest.raises(
        InvalidJobError, match=r"^upscale_strength is 0, which leaves none of 4 steps: use at"
    ):
        record.raise_for_state()
    assert worker.handle(job_of(6), "m2") is None
    assert worker.runner.prepared == [6]


def test_a_newer_message_goes_back_untouched(worker: Worker, client: Redis) -> None:
    newer = {"version": FORMAT_VERSION + 1, "id": "?", "jobs": []}
    said = f"of version {FORMAT_VERSION + 1}, this worker reads up to {FORMAT_VERSION}: update it"
    with pytest.raises(NewerMessageError, match=said):
        worker.handler.handle(newer, "m1")
    assert client.dbsize() == 0


# --- files beside the model ---------------------------------------------------------------------------------

WITH_FILE = job_of(6, prompt="a <cat>", file_hashes={"embedding:cat": "ab" * 32})


def test_a_job_whose_file_is_missing_goes_back_without_an_attempt(
    worker: Worker, client: Redis, storage: FlakyBucket
) -> None:
    """As often as it comes, and a worker that has the file does it then."""
    worker.submit(WITH_FILE)
    for _ in range(5):
        with pytest.raises(MissingFileError, match='lacks embedding "cat"'):
            worker.handle(WITH_FILE)
    record = worker.records.get(WITH_FILE.id)
    assert (record.state, record.attempts) == (State.QUEUED, 0)
    with Worker(client, storage, "w2", files=HasAll()) as other:
        assert other.handle(WITH_FILE) is None
    record = worker.records.get(WITH_FILE.id)
    assert (record.state, record.attempts, record.warnings) == (State.DONE, 1, ())


def test_a_job_whose_lora_is_missing_goes_back_without_an_attempt(
    worker: Worker, client: Redis, storage: FlakyBucket
) -> None:
    job = job_of(8, loras="detail=0.5", file_hashes={"lora:detail": "ab" * 32})
    worker.submit(job)
    with pytest.raises(MissingFileError, match=r'lacks LoRA "detail" \(ABABABABAB\)'):
        worker.handle(job)
    assert worker.records.get(job.id).attempts == 0
    with Worker(client, storage, "w2", files=HasAll()) as other:
        assert other.handle(job) is None
    assert worker.records.get(job.id).job.loras == job.loras


@pytest.mark.parametrize("fields", [{"loras": "detail"}, {"vae": "mine"}])
def test_a_job_that_does_not_say_which_file_its_name_means_is_looked_up_by_its_worker(
    worker: Worker, client: Redis, storage: FlakyBucket, fields: dict[str, Any]
) -> None:
    """It named a revision that no live worker served when it was submitted."""
    index = FileIndex.of(
        FileEntry(kind=kind, name=name, sha256="ab" * 32)
        for kind, name in ((Kind.LORA, "detail"), (Kind.VAE, "mine"))
    )
    job = job_of(9, **fields)
    worker.submit(job)
    assert worker.handle(job) is None
    assert "which no worker offers" in (worker.records.get(job.id).error or "")
    again = job_of(10, **fields)
    with Worker(client, storage, "w2", files=Offers(index)) as other:
        other.submit(again)
        assert other.handle(again) is None
        assert set(other.records.get(again.id).job.file_hashes.values()) == {"ab" * 32}
        # Sent again, it is answered from the bucket.
        client.delete(f"smallcat:job:{again.id}")
        other.submit(again)
        assert other.handle(again) is None
        assert other.records.get(again.id).cached


def test_what_looks_like_an_embedding_and_is_none_is_in_the_record(worker: Worker) -> None:
    job = job_of(7, prompt="a <dog>")
    worker.submit(job)
    assert worker.handle(job) is None
    [warning] = worker.records.get(job.id).warnings
    assert warning.startswith("<dog> in the prompt is drawn as words")


class Offers:
    """The files of a worker that has those of an index."""

    def __init__(self, index: FileIndex) -> None:
        self.index = index

    def provide(self, job: Job) -> Job:
        return with_files(job, self.index)

    def stop(self) -> None:
        pass


class HasAll:
    """The files of a worker that has what any job asks for."""

    index = NO_FILES

    def provide(self, job: Job) -> Job:
        return job

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("said", ["-1e308", "nan", "inf"])
def test_a_wait_that_cannot_have_been_is_said_nowhere(said: str, worker: Worker, client: Redis) -> None:
    """Producers can write when a job was submitted."""
    worker.submit(JOB)
    client.hset(job_key(JOB.id), "submitted_at", said)
    before = [sample.value for sample in next(iter(metrics.QUEUED.collect())).samples]
    assert worker.handle(JOB) is None
    assert [sample.value for sample in next(iter(metrics.QUEUED.collect())).samples] == before
    record = record_of(JOB.id, client.hgetall(job_key(JOB.id)) | {"submitted_at": "0"})
    assert (record.state, record.timings.queued) == (State.DONE, None)
