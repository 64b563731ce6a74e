"""`submit_job` and what it returns: the handle of a job, and its result."""

from __future__ import annotations

import asyncio
import math
import re
import shlex
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Unpack, overload

from producer.client.job_result import JobResult
from producer.client.sending import send
from producer.session import Session, session, short_look_up
from worker.contract.errors import InvalidJobError, UnknownJobError
from worker.contract.explain import short
from worker.contract.job import SUBMISSION_FIELDS, Job
from worker.contract.job_files import files_of
from worker.contract.job_keywords import JobFields
from worker.contract.job_parameters import DEFAULT_MODEL, MAX_SEED
from worker.contract.plain_text import plain
from worker.contract.record import JobRecord, State
from worker.contract.webhook import hook_of

if TYPE_CHECKING:
    from PIL import Image

    from worker.contract.queues import Takers

_ID = re.compile(r"[0-9a-f]{32}")
#: Images that one call of `submit_job` enqueues, at most.
MAX_IMAGES: Final = 1_000


@dataclass(frozen=True)
class Progress:
    """The progress of a job."""

    #: The job's state.
    state: State
    #: Denoising steps done.
    step: int
    #: Denoising steps in all; 0 until a worker took the job.
    steps: int
    #: Messages of its tenant in the job's queue, its own included; 0 once it runs.
    queued: int
    #: Live workers that take jobs from its queue.
    workers: int
    #: Why the job cannot start, and what to do; empty when it can.
    note: str = ""

    @property
    def fraction(self) -> float:
        """Share of the steps that are done, 0 to 1."""
        return 1.0 if self.state is State.DONE else self.step / self.steps if self.steps else 0.0


class JobHandle:
    """One submission of a job, or, by its id alone, a job; in any process that reaches the same Redis.

    `submit_job` returns the handle of its submission. Equal jobs have one id and are rendered once, and share
    nothing else: each handle has its own metadata and priority, and its `cancel` is its own. `JobHandle(id)`
    is the job for all that want it: it has the metadata and priority of the submission that was rendered, and
    its `cancel` cancels all submissions. `JobHandle(handle.id, handle.submission)` is the submission again.
    `tenant` is whose job it is, by which its record is found once Redis has it no longer; not given:
    `SMALLCAT_TENANT`'s.

    `await handle` is `await handle.aresult()`.
    """

    def __init__(self, job_id: str, submission: str = "", tenant: str | None = None) -> None:
        self.id = job_id
        #: The submission's own id; empty where this is the job for all that want it.
        self.submission = submission
        self._tenant = tenant
        #: The fields of the job that are the submission's own; None: not yet read.
        self._own: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """With the job's state; "unknown" where Redis does not know it, or not within half a second."""
        return f"JobHandle({self.id!r}, state={short_look_up.state(self.id, self.submission)!r})"

    def __await__(self) -> Generator[Any, None, JobResult]:
        return self.aresult().__await__()

    def record(self) -> JobResult:
        """The job's record as it is now. One that has expired in Redis is read from the bucket.

        Raises `UnknownJobError`, `QueueError`, `StorageError`.
        """
        now = session()
        try:
            with now.queue_errors():
                record = now.records.get(self.id, self.submission)
                if self._is_missing(record):
                    record = now.records.get(self.id)
                return self._seen(record)
        except UnknownJobError:
            # Anything but an id would be a strange key in the bucket.
            stored = now.lasting(self.id, self._tenant) if _ID.fullmatch(self.id) else None
            # Somebody may have deleted the picture alone.
            if stored is None or not _has_picture(stored):
                raise
            record = stored
        with now.queue_errors():
            if self.submission and now.records.submission(self.id, self.submission)[1]:
                record = record.given_up()
            return self._seen(record)

    def state(self) -> State:
        """The job's state. Raises as `record`."""
        return self.record().state

    def progress(self) -> Progress:
        """The steps done, and what the job waits for. Raises as `record`.

        Workers write the steps twice a second while progress is polled, so the first call may return older
        ones.
        """
        record = self.record()
        queued = workers = 0
        note = ""
        if record.state is State.WAITING:
            jobs = " and of job ".join(record.waits_for)
            note = f"It waits for the picture of job {jobs}."
        elif not record.state.is_final:
            now = session()
            with now.queue_errors():
                takers = now.fleet.takers(record.queue, record.job)
                if record.state is State.RUNNING:
                    now.records.watch()
                if record.state is State.QUEUED:
                    job = record.job
                    queued = now.fleet.length(record.queue, job.version, job.tenant)
            workers = takers.workers
            note = "" if workers else _unserved(record, takers)
        return Progress(record.state, record.step, record.steps, queued, workers, note)

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the picture, at most `timeout` seconds (None: without end).

        Warns while no worker serves the job's queue. Raises the job's own error where it failed (`JobError`,
        `CallerError`, `StorageError`), `JobCancelledError`, `TimeoutError`, `UnknownJobError`, `QueueError`.
        After a `TimeoutError` the job continues.
        """
        now = session()
        warned = False

        def idle(record: JobRecord) -> None:
            nonlocal warned
            if not warned and not (takers := now.fleet.takers(record.queue, record.job)).workers:
                warned = True
                warnings.warn(plain(_unserved(record, takers)), stacklevel=4)

        _check_timeout(timeout)
        try:
            with now.queue_errors():
                found = now.records.wait(self.id, timeout, idle, self.submission)
                if self._is_missing(found):
                    found = now.records.wait(self.id, timeout, idle)
                record = self._seen(found)
        except UnknownJobError:
            record = self.record()
        record.raise_for_state()
        return record

    async def aresult(self, timeout: float | None = None) -> JobResult:
        """As `result`, on an event loop: other tasks run meanwhile. Cancelling it leaves the job alone."""

        def unserved(record: JobRecord, takers: Takers) -> None:
            warnings.warn(plain(_unserved(record, takers)), stacklevel=5)

        _check_timeout(timeout)
        now = session()
        try:
            with now.queue_errors():
                found = await now.awaiting.wait(self.id, timeout, unserved, self.submission)
                if found.uri is None and await asyncio.to_thread(self._is_missing, found):
                    found = await now.awaiting.wait(self.id, timeout, unserved)
            # A handle that another process made has to ask Redis for what is its own.
            record = await asyncio.to_thread(self._seen, found) if self._is_to_read else self._seen(found)
        except UnknownJobError:
            # One short request of the bucket, which boto3 can only do in a thread.
            record = await asyncio.to_thread(self.record)
        record.raise_for_state()
        return record

    def image(self, timeout: float | None = None) -> Image.Image:
        """Wait for the picture and fetch it. Raises as `result`."""
        return self.result(timeout).image()

    def cancel(self) -> State:
        """Give this submission up. Returns its state: a running job is cancelled at its next step.

        While others want the same job, this submission alone is cancelled, at once, and the job goes on for
        them; so does a run of a prompt file that sent it. The handle of a job by its id alone cancels it for
        all. A job that is done, failed or cancelled keeps its state. Raises `UnknownJobError`, also for a
        submission that there never was, and `QueueError`.
        """
        now = session()
        try:
            with now.queue_errors():
                return now.records.cancel(self.id, self.submission)
        except UnknownJobError:
            # Perhaps it was done long ago. A submission that there never was is unknown still.
            with now.queue_errors():
                if self.submission and not now.records.submission(self.id, self.submission)[0]:
                    raise
            return self.record().state

    @property
    def _is_to_read(self) -> bool:
        """Whether Redis has to be asked for what is the submission's own."""
        return bool(self.submission) and self._own is None

    def _is_missing(self, record: JobRecord) -> bool:
        """Whether the job should be done, by what became of its submission, and has no picture.

        Whoever submits jobs may have deleted its record while it was under way.
        """
        if record.state is not State.DONE or record.uri is not None:
            return False
        return session().bucket is not None and not _has_picture(record)

    def _seen(self, record: JobRecord) -> JobResult:
        """The job's record with what is the submission's own."""
        if self._is_to_read:
            self._own, _ = session().records.submission(self.id, self.submission)
        if self.submission:
            # The record has another submission's own: none of it is shown where this one's has expired.
            record = record.with_own(self._own or {})
        if record.state is State.DONE and record.uri is None and (bucket := session().bucket) is not None:
            # Done, and the job was submitted again since.
            uri = bucket.uri(self.id, record.job.format, record.job.tenant)
            record = record.model_copy(update={"uri": uri})
        return JobResult.of(record)

    def _repr_png_(self) -> bytes | None:
        """The picture in a notebook, once it is done."""
        record = self.record()
        return record._repr_png_() if record.state is State.DONE else None


@overload
def submit_job(
    prompt: str | Job, *, images: None = None, webhook: str | None = None, **fields: Unpack[JobFields]
) -> JobHandle: ...
@overload
def submit_job(
    prompt: str | Job, *, images: int, webhook: str | None = None, **fields: Unpack[JobFields]
) -> list[JobHandle]: ...
def submit_job(
    prompt: str | Job,
    *,
    images: int | None = None,
    webhook: str | None = None,
    **fields: Unpack[JobFields],
) -> JobHandle | list[JobHandle]:
    """Enqueue one job and return at once. With `images`, 1 to 1,000, so many, of consecutive seeds: a list.

    `prompt` is a text, with the other fields of `Job` as keywords, or a whole `Job`, whose fields the
    keywords replace. A job that says no `tenant` is `SMALLCAT_TENANT`'s. Every field is checked before
    anything is sent. Equal jobs have equal ids, and are rendered once; the handle is this submission's own.
    `webhook` is an address of https that is told, by `smallcat webhooks run`, when the job is done, failed or
    cancelled for this submission.
    `image` and `mask` are a path, bytes, a Pillow image, a numpy array, an s3:// address or a handle: of a
    job that is not done, too. Then this one waits for it, and fails with it.

    Raises `InvalidJobError` that names each wrong field, its value and its limit; `QueueError` where Redis
    cannot be reached within `SMALLCAT_SUBMIT_TIMEOUT_S`, is full, or refuses; `SettingsError`. After an
    error nothing is enqueued, unless the connection was lost after the message was sent: submitting again
    is safe. Of several `images` the first ones may be enqueued; with a `seed` of yours, submitting again is
    safe likewise.
    """
    now = session()
    values: dict[str, Any] = {"prompt": prompt, **fields}
    if isinstance(prompt, Job):
        said = {name: getattr(prompt, name) for name in prompt.said}
        values = prompt.model_dump(exclude_unset=False) | said | fields
    tenant = values.get("tenant", now.settings.tenant)
    given = now.given(values, tenant)
    job = Job.parse(given.fields if given else values).of_tenant(now.settings.tenant)
    hook = hook_of(webhook, now.settings.webhook_hosts, job.tenant)
    if given:
        now.store(given, job.tenant)
    if images is None:
        return _send(now, job, hook)
    return [_send(now, each, hook) for each in _of_consecutive_seeds(job, images)]


def _of_consecutive_seeds(job: Job, images: int) -> list[Job]:
    """`job` and its next ones, as AUTOMATIC1111 counts a batch's seeds. Raises `InvalidJobError`."""
    if type(images) is not int or not 1 <= images <= MAX_IMAGES:
        raise InvalidJobError(f"images is {short(images)}: it must be 1 to {MAX_IMAGES:,}.")
    if job.seed + images - 1 > MAX_SEED:
        raise InvalidJobError(
            f"seed is {job.seed}, and {images} images count on from it: it must be at most "
            f"{MAX_SEED - images + 1}."
        )
    return [job.model_copy(update={"seed": job.seed + number}) for number in range(images)]


def _send(now: Session, job: Job, hook: str) -> JobHandle:
    """Enqueue `job`. Raises `QueueError`."""
    resolved, submission = send(now, job, hook)
    handle = JobHandle(resolved.id, submission, resolved.tenant)
    handle._own = {name: getattr(resolved, name) for name in SUBMISSION_FIELDS}
    return handle


def _has_picture(record: JobRecord) -> bool:
    """Whether the bucket has a job's picture and its record. Raises `StorageError`."""
    bucket, job = session().bucket, record.job
    return bucket is not None and bucket.find(record.id, job.format, job.tenant) is not None


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not (timeout >= 0 and math.isfinite(timeout)):
        raise ValueError(f"timeout is {timeout}: it must be None or seconds >= 0.")


def _unserved(record: JobRecord, takers: Takers) -> str:
    """Why nobody renders the job, and what to do; `takers`: who takes from its queue."""
    job, paused, reads = record.job, takers.paused, takers.reads
    if paused:
        which = "The worker that serves" if paused == 1 else f"The {paused} workers that serve"
        take = "takes" if paused == 1 else "take"
        return f'{which} the model "{job.model}" {take} no jobs at present: `smallcat doctor` says why.'
    if takers.lacking:
        names = ", ".join(files_of(job))
        return (
            f"No live worker has {names}: put the file back where one of them looks, or submit again to use "
            "what they have now."
        )
    if reads:
        return (
            f"The job needs a newer worker: its message is of version {job.version}, and the live workers "
            f"read up to version {reads}. It waits until one of them is upgraded."
        )
    if job.is_open:
        model = "" if job.model == DEFAULT_MODEL else f"SMALLCAT_MODEL={shlex.quote(job.model)} "
        return f'No worker serves the model "{job.model}": start one with `{model}celery -A worker worker`.'
    return (
        f'No worker serves the model "{job.model}" at revision {job.revision}: '
        "start one that does, or submit again to use what the live workers serve."
    )
