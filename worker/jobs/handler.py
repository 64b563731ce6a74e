"""The way of one job through a worker, from its message to its picture in the bucket.

    message ─► claim ─► in the bucket already? ─► engine ─► encode ─► put ─► done mark ─► acknowledgement

The message is acknowledged when `handle` returns, so whatever kills the process before that leaves the job
in Redis for another worker. What goes wrong is decided by whose fault it is (`worker.contract.errors`):

    the caller's                the record says so, and the message is done with
    the job's                   the same, after `max_attempts` tries, each after a longer pause
    the machine's               the message goes back to the queue (`MachineError` leaves `handle`)
    the storage's               it is asked again, with the picture in memory, until `upload_timeout_s`
    Redis'                      it is asked again until the worker stops; then the message goes back

An attempt counts when the job failed or its worker died: what is another's fault is not counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from worker.contract import infotext
from worker.contract.errors import (
    EngineStoppedError,
    InvalidJobError,
    JobCancelledError,
    JobError,
    MachineError,
    PermanentStorageError,
    PoisonJobError,
    RenderError,
    SmallcatError,
    StorageError,
    UnknownModelError,
)
from worker.contract.job import DEFAULT_MODEL, SUBMISSION_FIELDS, Job, ServedModel
from worker.contract.message import Message
from worker.contract.queues import queue_of
from worker.contract.record import Attempt, JobRecord, State, Timings
from worker.engine.engine import Engine
from worker.engine.runner import Picture
from worker.engine.ticket import Rendered
from worker.jobs import metrics
from worker.jobs.image_file import CONTENT_TYPES, encode
from worker.jobs.quarantine import Quarantine
from worker.state.records import Claim, Records
from worker.state.redis_client import RedisError
from worker.storage.bucket import Bucket

logger = logging.getLogger("smallcat.jobs")

T = TypeVar("T")

#: Seconds between two tries of a PUT: the first, and the most it grows to. See `_jittered`.
PUT_BACKOFF_S = (0.5, 10.0)
#: Seconds between two attempts at a job that failed: the first, and the most it grows to. See `_jittered`.
RETRY_BACKOFF_S = (2.0, 60.0)


class JobHandler:
    """Handles jobs for one worker process. Thread-safe: each pool thread calls `handle`."""

    def __init__(
        self,
        *,
        name: str,
        served: ServedModel,
        engine: Engine[Any],
        records: Records,
        storage: Bucket,
        lease_s: float,
        max_attempts: int,
        upload_timeout_s: float,
    ) -> None:
        self._name = name
        #: The model this worker serves.
        self.served = served
        self._engine = engine
        self._records = records
        self._storage = storage
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._upload_timeout_s = upload_timeout_s
        self._quarantine = Quarantine()
        self._changed = threading.Condition()
        self._stopping = False
        #: (steps done, steps in all) of the jobs this process holds, where the engine does not know better.
        self._on_board: dict[str, tuple[int, int]] = {}
        #: Those of them that were cancelled.
        self._cancelled: set[str] = set()

    def progress(self) -> dict[str, tuple[int, int]]:
        """(steps done, steps in all) by id of all jobs this process holds, also while they upload."""
        rendering = self._engine.progress()
        with self._changed:
            return {job_id: rendering.get(job_id, steps) for job_id, steps in self._on_board.items()}

    def cancel(self, job_id: str) -> None:
        """Let a job end with `JobCancelledError`, at its next step or while it waits for the storage."""
        with self._changed:
            if job_id in self._on_board:
                self._cancelled.add(job_id)
                self._changed.notify_all()
        self._engine.cancel(job_id)

    def stop(self) -> None:
        """Give back also those jobs whose picture waits for the storage."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._quarantine.stop()

    def handle(self, payload: object, message_id: str, *, redelivered: bool = False) -> float | None:
        """Do the job in `payload`, or note why not.

        Returns None when its message can be acknowledged, or the seconds after which it must come back for
        the job's next attempt. Raises `MachineError` where the message must go back to the queue,
        `NewerMessageError` where it must go back untouched. `redelivered` says that the message was
        fetched before.
        """
        try:
            message = Message.parse(payload)
        except InvalidJobError as error:
            logger.error("Dropped: %s", error)
            metrics.JOBS.labels("failed").inc()
            return None
        suspect = redelivered and self._records.is_suspect(message.id, self._max_attempts)
        with self._quarantine.place(alone=suspect):
            try:
                return self._attempt(message, message_id)
            except RedisError:
                # Redis refuses for good, or did not answer until the worker stopped.
                with contextlib.suppress(RedisError):
                    self._records.give_back(message.id, message_id)
                raise

    def _attempt(self, message: Message, message_id: str) -> float | None:
        """As `handle`, for a message that can be read."""
        verdict, attempt, queued_s = self._records.claim(
            message.job,
            message_id,
            worker=self._name,
            lease_s=self._lease_s,
            max_attempts=self._max_attempts,
            queue=queue_of(message.job),
            run=message.run,
        )
        if verdict in (Claim.TAKEN, Claim.FINAL):
            metrics.JOBS.labels("taken").inc()
            return None
        with self._changed:
            self._on_board[message.id] = (0, 0)
            # Whoever submits a job again after its cancellation wants it.
            self._cancelled.discard(message.id)
        try:
            if verdict is Claim.POISON:
                tries = f"{attempt} times (SMALLCAT_MAX_ATTEMPTS)"
                raise PoisonJobError(f"The job was tried {tries}, and its worker died: see its tries.")
            metrics.QUEUED.observe(queued_s)
            self._render(message, attempt, queued_s)
        except MachineError:
            self._records.give_back(message.id, message_id)
            metrics.JOBS.labels("given_back").inc()
            raise
        except SmallcatError as error:
            return self._note_failure(message.id, message_id, attempt, error)
        finally:
            with self._changed:
                self._on_board.pop(message.id, None)
                self._cancelled.discard(message.id)
        return None

    def _render(self, message: Message, attempt: int, queued_s: float) -> None:
        """Answer from the bucket, or render and put. Raises `SmallcatError`."""
        wanted = message.job
        if wanted.model not in (DEFAULT_MODEL, self.served.name) or not (
            wanted.is_open or wanted.revision == self.served.revision
        ):
            revision = "any revision" if wanted.is_open else f"revision {wanted.revision}"
            raise UnknownModelError(
                f"The job wants {wanted.model} at {revision}, "
                f"this worker serves {self.served.name} at {self.served.revision}: send it to its own queue."
            )
        job = wanted.resolved(self.served)
        stored = self._patiently(message.id, lambda: self._storage.find(message.id, job.format))
        if stored is not None and self._answer_from(message, stored, queued_s):
            return
        started_s = time.monotonic()
        rendered: Rendered = self._engine.submit(message.id, job).result()
        rendered_s = time.monotonic()
        metrics.RENDERED.observe(rendered_s - started_s)
        steps = job.steps or 0
        with self._changed:
            self._on_board[message.id] = (steps, steps)
        record = JobRecord(
            id=message.id,
            state=State.DONE,
            job=job,
            step=steps,
            steps=steps,
            attempts=attempt,
            uri=self._storage.uri(message.id, job.format),
            timings=Timings(queued=queued_s, rendered=rendered_s - started_s),
            worker=self._name,
            warnings=rendered.warnings,
            nsfw=rendered.picture.nsfw,
        )
        picture = _encode(rendered.picture, job)
        self._put(record, picture)
        uploaded_s = time.monotonic() - rendered_s
        metrics.UPLOADED.observe(uploaded_s)
        timings = record.timings.model_copy(update={"uploaded": uploaded_s})
        self._records.done(record.model_copy(update={"timings": timings}))
        metrics.JOBS.labels("rendered").inc()

    def _answer_from(self, message: Message, stored: bytes, queued_s: float) -> bool:
        """Mark the job done with what the bucket holds; priority and metadata are this submission's own.

        False: what it holds cannot be read, and the job is rendered again.
        """
        try:
            record = JobRecord.model_validate_json(stored)
        except ValidationError as error:
            logger.warning("Job %s: the record beside its picture cannot be read: %s", message.id, error)
            return False
        own = {name: getattr(message.job, name) for name in SUBMISSION_FIELDS}
        self._records.done(
            record.model_copy(
                update={
                    "job": record.job.model_copy(update=own),
                    "step": record.steps,
                    # The bucket may be a copy of the one it was put into.
                    "uri": self._storage.uri(message.id, record.job.format),
                    "timings": record.timings.model_copy(update={"queued": queued_s}),
                    "cached": True,
                }
            )
        )
        metrics.JOBS.labels("cached").inc()
        return True

    def _put(self, record: JobRecord, picture: bytes) -> None:
        """Put record and picture."""
        image_format = record.job.format
        lasting = record.model_dump_json(exclude={"queue", "submitted_at", "step", "tries", "runs"}).encode()
        mime = CONTENT_TYPES[image_format]
        self._patiently(record.id, lambda: self._storage.put(record.id, image_format, picture, lasting, mime))

    def _patiently(self, job_id: str, do: Callable[[], T]) -> T:
        """What `do` returns, tried again and again while the storage fails in a way that may pass."""
        deadline_s = time.monotonic() + self._upload_timeout_s
        pause_s, longest_s = PUT_BACKOFF_S
        while True:
            if job_id in self._cancelled:
                raise JobCancelledError("The job was cancelled.")
            try:
                return do()
            except PermanentStorageError:
                raise
            except StorageError as error:
                if time.monotonic() + pause_s > deadline_s:
                    limit = f"{self._upload_timeout_s:g} s (SMALLCAT_UPLOAD_TIMEOUT_S)"
                    raise StorageError(f"The storage failed for {limit}: {error}") from error
                logger.warning("Job %s waits for the storage: %s", job_id, error)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or job_id in self._cancelled, _jittered(pause_s)
                )
            if self._stopping:
                raise EngineStoppedError("The worker is stopping: the job goes back to the queue.")
            pause_s = min(2 * pause_s, longest_s)

    def _note_failure(self, job_id: str, message_id: str, attempt: int, error: SmallcatError) -> float | None:
        """Write down that an attempt failed. Returns seconds until the next; None: it was the last."""
        name, text = type(error).__name__, str(error)
        told = json.dumps({"job": job_id, "attempt": attempt, "error": name, "text": text})
        again = isinstance(error, JobError) and not isinstance(error, PoisonJobError)
        if again and attempt < self._max_attempts:
            now_s = time.time()
            failure = Attempt(attempt=attempt, worker=self._name, at=now_s, error_type=name, error=text)
            self._records.retried(job_id, message_id, failure)
            metrics.JOBS.labels("retried").inc()
            logger.warning("%s", told)
            first_s, longest_s = RETRY_BACKOFF_S
            return _jittered(min(first_s * 2.0 ** (attempt - 1), longest_s))
        self._records.failed(job_id, message_id, error)
        cancelled = isinstance(error, JobCancelledError)
        metrics.JOBS.labels("cancelled" if cancelled else "failed").inc()
        logger.log(logging.INFO if cancelled else logging.ERROR, "%s", told)
        return None


def _encode(picture: Picture, job: Job) -> bytes:
    """The picture's file. What an encoder raises is about this job alone."""
    try:
        return encode(picture, job.format, infotext.write(job))
    except Exception as error:
        raise RenderError(f"The picture cannot be encoded: {type(error).__name__}: {error}") from error


def _jittered(seconds: float) -> float:
    """Half of it to all of it, at random, so that a fleet does not come back all at once."""
    return seconds * random.uniform(0.5, 1.0)  # noqa: S311 - nothing secret
