"""The way of one job through a worker, from its message to its picture in the bucket.

    message ─► claim ─► in the bucket already? ─► engine ─► encode ─► put ─► done mark and acknowledgement

The message is acknowledged in the step that marks the job done, and any other one when `handle` has returned,
so whatever kills the process before that leaves the job in Redis for another worker. What happens after a
failure:

    the job's or the caller's fault   decided by `worker.jobs.retry_policy`
    the machine's fault               the message goes back to the queue: `MachineError` leaves `handle`
    the engine fails                  the same, and it counts as the death of the worker, which ends
    the storage fails                 each request is repeated: `worker.jobs.storage_retry`
    the bucket refuses all            the message goes back to the queue: `worker.jobs.bucket_access`
    Redis fails                       the client repeats each command until the worker stops; then the message
                                      goes back to the queue

An attempt counts when the job failed or its worker died.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from worker.contract import infotext
from worker.contract.errors import (
    BucketRefusedError,
    InvalidJobError,
    RenderError,
    SmallcatError,
    StorageError,
    UnknownModelError,
)
from worker.contract.job import Job
from worker.contract.job_files import lacks_hashes, unknown_warnings
from worker.contract.job_parameters import DEFAULT_MODEL
from worker.contract.message import Message
from worker.contract.plain_text import plain
from worker.contract.prompt_syntax import warnings_of
from worker.contract.queues import queue_of
from worker.contract.record import JobRecord, State, Timings
from worker.contract.served_model import ServedModel
from worker.engine.engine import Engine
from worker.engine.runner import Picture
from worker.jobs import job_log, metrics
from worker.jobs.bucket_access import BucketAccess
from worker.jobs.failed_attempts import FailedAttempts
from worker.jobs.image_file import CONTENT_TYPES, encode
from worker.jobs.in_flight import JobsInFlight
from worker.jobs.input_arrays import arrays_of
from worker.jobs.job_files import Files, NoFiles
from worker.jobs.put_back import put_back
from worker.jobs.quarantine import Quarantine
from worker.jobs.rates import Rates
from worker.jobs.rendering import render
from worker.jobs.retry_policy import RetryPolicy
from worker.jobs.storage_retry import StorageRetry
from worker.jobs.stored import has_picture, is_stored
from worker.state.keys import attempts_key, job_key
from worker.state.records import Claim, Records
from worker.state.redis_client import RedisError
from worker.state.usage import Used
from worker.storage.bucket import Bucket
from worker.storage.input_pixels import InputPixels
from worker.tracing.attempts import stage

logger = logging.getLogger("smallcat.jobs")

#: Seconds until a message comes back whose job begins with a picture that is not done.
WAITING_DELAY_S = 5.0


@dataclass(frozen=True)
class Handled:
    """What is to be done with a message that was handled."""

    #: Keys of the job's record, which says that nothing is left to do, and of its attempts; none where no
    #: record is left that could.
    records: tuple[str, str] | None
    #: Seconds until the message must come back for the job's next attempt; None: it is acknowledged.
    delay_s: float | None = None
    #: Whether this message's work marked the job done, which acknowledges the message (`Records.done`).
    is_done: bool = False


class JobHandler:
    """Handles jobs for one worker process. Thread-safe: each pool thread calls `handle`."""

    def __init__(
        self,
        *,
        name: str,
        served: ServedModel,
        engine: Engine[Any],
        records: Records,
        bucket: Bucket,
        lease_s: float,
        max_attempts: int,
        upload_timeout_s: float,
        mark_as_generated: bool = True,
        files: Files = NoFiles(),  # noqa: B008 - has no state
        rates: Rates | None = None,
    ) -> None:
        self._name, self._files = name, files
        #: The model that this worker serves.
        self.served = served
        self._engine = engine
        self._records = records
        self._bucket = bucket
        self._lease_s = lease_s
        self._mark_as_generated = mark_as_generated
        #: How much is done at present.
        self.rates = rates or Rates()
        self._policy = RetryPolicy(max_attempts)
        self._failed_attempts = FailedAttempts(name, records, self._policy)
        self._quarantine = Quarantine()
        self._in_flight = JobsInFlight()
        #: Whether the bucket takes this worker's pictures. While it is closed, no job should be fetched.
        self.access = BucketAccess(lambda size: bucket.probe(size))
        self._retry_storage = StorageRetry(self._in_flight, self.access, upload_timeout_s)

    def progress(self) -> dict[str, tuple[int, int]]:
        """(steps done, steps in all) by id of all jobs in flight, also of those that are uploaded."""
        return self._in_flight.progress(self._engine.progress())

    def cancel(self, job_id: str) -> None:
        """Let a job end with `JobCancelledError`, at its next step or while it waits for the storage."""
        self._in_flight.cancel(job_id)
        self._engine.cancel(job_id)

    def stop(self) -> None:
        """Give back also those jobs that wait for the storage or for a file, or to run alone."""
        self._files.stop()
        self._in_flight.stop()
        self._quarantine.stop()
        self.access.end()

    def handle(self, payload: object, message_id: str, *, redelivered: bool = False) -> Handled:
        """Do the job in `payload`, or record why not.

        Raises `MachineError` where the message must go back to the queue, and `InvalidJobError` where nothing
        can be read in it. `redelivered`: the message was fetched before.
        """
        if redelivered:
            metrics.REDELIVERED.inc()
        try:
            message = Message.parse(payload)
        except InvalidJobError as error:
            metrics.JOBS.labels("failed", type(error).__name__).inc()
            raise
        try:
            self.access.require()
        except BucketRefusedError as error:  # Fetched just before access closed.
            metrics.JOBS.labels("given_back", type(error).__name__).inc()
            raise
        alone = redelivered and self._policy.runs_alone(*self._records.attempts_and_deaths(message.id))
        with self._quarantine.admit(alone=alone):
            try:
                return self._attempt(message, message_id, alone=alone)
            except RedisError:
                # Redis refuses for good, or did not answer until the worker stopped.
                with contextlib.suppress(RedisError):
                    self._records.give_back(message.id, message_id)
                raise

    def _attempt(self, message: Message, message_id: str, *, alone: bool) -> Handled:
        """As `handle`, for a message that can be read. `alone`: no other job runs here meanwhile."""
        with stage("claim"):
            claim, attempt, queued_s = self._records.claim(
                message.job,
                message_id,
                worker=self._name,
                lease_s=self._lease_s,
                max_attempts=self._policy.max_attempts,
                queue=queue_of(message.job),
                run=message.run,
                is_stored=lambda: is_stored(self._bucket, message),
                has_picture=lambda parent: has_picture(self._bucket, parent, message.job.tenant),
            )
        keys = job_key(message.id), attempts_key(message.id)
        if claim is Claim.WAITING:
            metrics.JOBS.labels("given_back", "").inc()
            job_log.not_begun(message.id, claim)
            return Handled(keys, WAITING_DELAY_S)
        if claim in (Claim.TAKEN, Claim.FINAL, Claim.DROPPED):
            metrics.JOBS.labels("taken", "").inc()
            job_log.not_begun(message.id, claim)
            return Handled(None if claim is Claim.DROPPED else keys)
        tag = message_id.partition("/")[2]
        with self._in_flight.hold(message.id), metrics.IN_FLIGHT.track_inprogress():
            try:
                self._complete(message, tag, attempt, queued_s, may_render=claim is Claim.RENDER)
            except SmallcatError as error:
                delay_s = self._failed_attempts.settle(message.id, message_id, attempt, error, alone=alone)
                return Handled(keys, delay_s)
        return Handled(keys, is_done=True)

    def _complete(
        self, message: Message, tag: str, attempt: int, queued_s: float | None, *, may_render: bool
    ) -> None:
        """Put the job's picture into the bucket, unless it is there, and mark the job done.

        `tag`: under which the message is held. `may_render`: whether an attempt is left. A picture that is in
        the bucket answers the job even so: its worker may have died after it was put there, or Redis may have
        lost that it was.
        Raises `SmallcatError`.
        """
        if may_render:
            metrics.observe_wait(queued_s)
            job_log.begun(message.id, attempt, queued_s, self._name)
        job = self._resolved(message.job)
        where = message.id, job.format, job.tenant
        with stage("find"):
            stored = self._retry_storage(message.id, lambda: self._bucket.find(*where))
        if stored is not None and self._answer_from(message, tag, job, stored, queued_s):
            return
        if not may_render:
            raise self._policy.poison(attempt)
        job = self._files.provide(job)
        inputs = self._inputs(message.id, job)
        started_s = time.monotonic()
        rendered = render(self._engine, message.id, job, arrays_of(inputs))
        rendered_s = time.monotonic()
        steps = job.all_steps
        self._in_flight.rendered(message.id, steps)
        job_log.rendered(message.id, steps, rendered_s - started_s, rendered)
        record = JobRecord(
            id=message.id,
            state=State.DONE,
            job=job,
            step=steps,
            steps=steps,
            attempts=attempt,
            uri=self._bucket.uri(*where),
            timings=Timings(queued=queued_s, rendered=rendered_s - started_s),
            worker=self._name,
            warnings=(
                *(inputs.warnings if inputs else ()),
                *rendered.warnings,
                *warnings_of(job),
                *unknown_warnings(job, self._files.index),
            ),
            nsfw=rendered.picture.nsfw,
        )
        with metrics.ENCODED.time(), stage("encode"):
            data = self._file_of(rendered.picture, job, inputs)
        with metrics.UPLOADED.time(), stage("upload", size=len(data)):
            self._put(record, data)
        uploaded_s = time.monotonic() - rendered_s
        timings = record.timings.model_copy(update={"uploaded": uploaded_s})
        used = Used(device_s=rendered.device_s, size=len(data))
        with stage("done"):
            if not self._records.done(record.model_copy(update={"timings": timings}), tag, used):
                self._delete_if_forgotten(record)
        job_log.done(message.id, len(data), uploaded_s)
        metrics.JOBS.labels("rendered", "").inc()
        self.rates.picture()

    def _inputs(self, job_id: str, job: Job) -> InputPixels | None:
        """What the job begins with. Raises `SmallcatError`."""
        if not job.image:
            return None
        with stage("inputs"):
            return self._retry_storage(job_id, lambda: self._bucket.pixels_of(job))

    def _delete_if_forgotten(self, record: JobRecord) -> None:
        """Delete a picture that was put while its job was forgotten, where this worker has the right to.

        `smallcat forget` looks again when no worker has a claim on the job. This is for one that was frozen.
        """
        if not self._records.was_forgotten(record.id):
            return
        try:
            self._bucket.delete(record.id, record.job.format, record.job.tenant)
        except StorageError as error:
            logger.warning("Job %s was forgotten; its picture cannot be deleted: %s", record.id, plain(error))

    def _resolved(self, wanted: Job) -> Job:
        """`wanted` with the defaults of the model served here. Raises `UnknownModelError` for another one."""
        is_model = wanted.model in (DEFAULT_MODEL, self.served.name)
        if not is_model or not (wanted.is_open or wanted.revision == self.served.revision):
            revision = "any revision" if wanted.is_open else f"revision {wanted.revision}"
            raise UnknownModelError(
                f"The job wants {wanted.model} at {revision}, "
                f"this worker serves {self.served.name} at {self.served.revision}: send it to its own queue."
            )
        return wanted.resolved(self.served)

    def _answer_from(
        self, message: Message, tag: str, job: Job, stored: bytes, queued_s: float | None
    ) -> bool:
        """Mark the job done with what the bucket holds; priority and metadata are this submission's own.

        `job` is the message's with the model's defaults. False: the stored record cannot be read, or is not
        this job's, and the job must be rendered again.
        """
        try:
            record = JobRecord.model_validate_json(stored)
        except ValidationError as error:
            logger.warning(
                "Job %s: the record beside its picture cannot be read: %s", message.id, plain(error)
            )
            return False
        if not _is_of(record, message, job):
            logger.warning("Job %s: the record beside its picture is another job's", message.id)
            return False
        self._records.done(
            record.model_copy(
                update={
                    "job": record.job.submitted_as(message.job),
                    "step": record.steps,
                    # The bucket may be a copy of the one that the picture was put into.
                    "uri": self._bucket.uri(message.id, record.job.format, job.tenant),
                    "timings": record.timings.model_copy(update={"queued": queued_s}),
                    "cached": True,
                }
            ),
            tag,
            Used(is_cached=True),
        )
        metrics.JOBS.labels("cached", "").inc()
        job_log.cached(message.id)
        return True

    def _put(self, record: JobRecord, picture: bytes) -> None:
        """Put the picture and the lasting record."""
        image_format, tenant = record.job.format, record.job.tenant
        lasting = record.model_dump_json(exclude=_NOT_LASTING).encode()
        mime = CONTENT_TYPES[image_format]
        self._retry_storage(
            record.id,
            lambda: self._bucket.put(record.id, image_format, picture, lasting, mime, tenant),
            len(picture),
        )

    def _file_of(self, picture: Picture, job: Job, inputs: InputPixels | None) -> bytes:
        """The picture's file. Whatever is raised on the way is this job's own failure."""
        try:
            return encode(
                put_back(job, inputs, picture),
                job.format,
                infotext.write(job, self._files.index),
                mark_as_generated=self._mark_as_generated,
                is_composite=inputs is not None and inputs.keeps_a_part,
            )
        except Exception as error:
            raise RenderError(f"The picture cannot be encoded: {type(error).__name__}: {error}") from error


#: Fields of a record that the lasting one does not have.
_NOT_LASTING = {"queue", "submitted_at", "step", "tries", "runs", "waits_for"}
#: Fields of a job that the worker fills in where nobody could say them before.
_SERVED = ("model", "revision", "loras", "file_hashes")


def _is_of(record: JobRecord, message: Message, job: Job) -> bool:
    """Whether a stored record is that of the message's job, which is `job` with the model's defaults."""
    if record.id != message.id or record.state is not State.DONE:
        return False
    if message.job.is_open or lacks_hashes(message.job):  # Rendered with what was served then.
        rendered = {name: getattr(record.job, name) for name in _SERVED}
        job = job.model_copy(update=rendered)
    return record.job.id in (job.id, message.id)
