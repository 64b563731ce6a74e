"""`submit_job` and what it returns."""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from producer.session import Session, session
from worker.contract.errors import QueueError, UnknownJobError
from worker.contract.job import Job
from worker.contract.record import JobRecord, State

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("smallcat.producer")

_ID = re.compile(r"[0-9a-f]{32}")


class JobResult(JobRecord):
    """A finished job: its record, and the way to its picture."""

    @classmethod
    def of(cls, record: JobRecord) -> JobResult:
        """The result that `record` describes."""
        return cls.model_validate(dict(record))

    @property
    def seed(self) -> int:
        """The seed that was used, given or drawn."""
        return self.job.seed

    @property
    def width(self) -> int | None:
        """Pixels."""
        return self.job.width

    @property
    def height(self) -> int | None:
        """Pixels."""
        return self.job.height

    def url(self, expires_s: int = 3_600) -> str:
        """A link to the picture that any browser opens for `expires_s` seconds (1 to 604,800)."""
        uri = self._where()
        return session().bucket_of(uri).url(uri, expires_s)

    def data(self) -> bytes:
        """The picture's file as it lies in the bucket. Raises `StorageError`, `UnknownJobError`."""
        uri = self._where()
        return session().bucket_of(uri).get(uri)

    def image(self) -> Image.Image:
        """The picture. Raises `StorageError`, `UnknownJobError`."""
        import io

        from PIL import Image

        image = Image.open(io.BytesIO(self.data()))
        image.load()
        return image

    def _where(self) -> str:
        if self.uri is None:
            raise UnknownJobError(f"Job {self.id} is {self.state}: it has no picture.")
        return self.uri

    def _repr_png_(self) -> bytes:
        """The picture in a notebook."""
        import io

        file = io.BytesIO()
        self.image().save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    #: Where it is.
    state: State
    #: Denoising steps done.
    step: int
    #: Denoising steps in all; 0 until a worker took the job.
    steps: int
    #: Messages in the job's queue, its own among them; 0 once it runs.
    queued: int
    #: Live workers that take jobs from its queue.
    workers: int
    #: What stands in its way, and what to do; empty when nothing does.
    note: str = ""

    @property
    def fraction(self) -> float:
        """0 to 1."""
        return 1.0 if self.state is State.DONE else self.step / self.steps if self.steps else 0.0


class JobHandle:
    """A job by its id, in this process or any other that reaches the same Redis."""

    def __init__(self, job_id: str) -> None:
        self.id = job_id

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    def record(self) -> JobResult:
        """What is known of the job now. An expired record is read from the bucket.

        Raises `UnknownJobError`, `QueueError`, `StorageError`.
        """
        now = session()
        try:
            with now.queue_errors():
                return JobResult.of(now.records.get(self.id))
        except UnknownJobError:
            # What is no id would be a strange key.
            if now.bucket is None or not _ID.fullmatch(self.id):
                raise
            if (stored := now.bucket.record(self.id)) is None:
                raise
            result = JobResult.model_validate_json(stored)
            # Somebody may have deleted the picture alone.
            if now.bucket.find(self.id, result.job.format) is None:
                raise
            return result

    def state(self) -> State:
        """Where the job is. Raises as `record`."""
        return self.record().state

    def progress(self) -> Progress:
        """Steps done, and what the job waits for. Raises as `record`.

        While somebody looks, a worker writes its steps twice a second; the first look may see older ones.
        """
        record = self.record()
        queued = workers = 0
        note = ""
        if not record.state.is_final:
            now = session()
            with now.queue_errors():
                workers = len(now.fleet.serving(record.queue))
                if record.state is State.RUNNING:
                    now.records.watch()
                queued = now.fleet.length(record.queue) if record.state is State.QUEUED else 0
            if not workers:
                note = _nobody(record)
        return Progress(record.state, record.step, record.steps, queued, workers, note)

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the picture, at most `timeout` seconds (None: without end).

        While nobody serves the job's queue, a warning says so. Raises the job's own error (`JobError`,
        `CallerError`, `StorageError`; see `worker.contract.errors`) where it failed, `JobCancelledError`,
        `TimeoutError`, `UnknownJobError`, `QueueError`.
        """
        now = session()
        warned = False

        def idle(record: JobRecord) -> None:
            nonlocal warned
            if not warned and not now.fleet.serving(record.queue):
                warned = True
                warnings.warn(_nobody(record), stacklevel=4)

        if timeout is not None and not (timeout >= 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout is {timeout}: it must be None or seconds >= 0.")
        try:
            with now.queue_errors():
                record = now.records.wait(self.id, timeout, idle)
        except UnknownJobError:
            return self.record()
        record.raise_for_state()
        return JobResult.of(record)

    def image(self, timeout: float | None = None) -> Image.Image:
        """Wait for the picture and fetch it. Raises as `result`."""
        return self.result(timeout).image()

    def cancel(self) -> State:
        """Take the job back. Returns its state: a running one is cancelled at its next step.

        A job that is done, failed or cancelled stays what it is. Raises `UnknownJobError`, `QueueError`.
        """
        now = session()
        with now.queue_errors():
            return now.records.cancel(self.id)

    def _repr_png_(self) -> bytes | None:
        """The picture in a notebook, once it is done."""
        record = self.record()
        return record._repr_png_() if record.state is State.DONE else None


def submit_job(prompt: str | Job, **fields: Any) -> JobHandle:
    """Enqueue one job and return at once.

    `prompt` is a text, with the other fields of `Job` as keywords, or a whole `Job`. Every field is checked
    before anything is sent. Equal jobs have equal ids, and are rendered once.

    Raises `InvalidJobError` that names each wrong field, its value and its limit; `QueueError` where Redis
    cannot be reached within `SMALLCAT_SUBMIT_TIMEOUT_S`, is full, or refuses; `SettingsError`. After an
    error nothing is enqueued, unless the connection was lost after the message was sent: submitting again
    is safe.
    """
    if isinstance(prompt, Job):
        job = Job.parse(prompt.model_dump(exclude_unset=False) | fields)
    else:
        job = Job.parse({"prompt": prompt, **fields})
    return _send(session(), job)


def _send(now: Session, job: Job) -> JobHandle:
    """Enqueue `job`, trying again while Redis is out of reach. Raises `QueueError`."""
    from kombu.pools import producers

    from worker.celery import app, connection
    from worker.contract.message import task_call_of
    from worker.contract.queues import queue_of

    deadline = time.monotonic() + now.redis_retry_s
    with now.queue_errors(), now.one_retry():
        job = now.fleet.resolve(job)
        queue = queue_of(job)
        now.records.submitted(job, queue)
    pool = producers[connection(now.settings.redis_url)]
    while True:
        try:
            with now.queue_errors(), pool.acquire(block=True) as producer:
                app.send_task(
                    **task_call_of(job),
                    # Another one for each try: should both have arrived, the second finds the job taken.
                    task_id=f"{job.id}-{secrets.token_hex(4)}",
                    producer=producer,
                )
            return JobHandle(job.id)
        except QueueError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def _nobody(record: JobRecord) -> str:
    job = record.job
    if job.is_open:
        return f'No worker serves the model "{job.model}": start one with `celery -A worker worker`.'
    return (
        f'No worker serves the model "{job.model}" at revision {job.revision}: '
        "start one that does, or submit again to use what the live workers serve."
    )
