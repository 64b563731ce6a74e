"""The session: Redis and the buckets that this process' environment names, for all who submit and read.

`session()` is the one way to it. redis-py and boto3 load when first needed, and nothing is connected before.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from worker.contract.errors import InvalidJobError, PermanentStorageError, StorageError, UnknownJobError
from worker.contract.input_reference import MAX_INPUT_BYTES, InputReference
from worker.contract.object_keys import object_key
from worker.contract.plain_text import plain
from worker.contract.record import JobRecord, State
from worker.contract.settings import ProducerSettings, producer_settings
from worker.storage.options import BucketOptions

if TYPE_CHECKING:
    from redis.client import Redis

    from worker.contract.choices import ImageFormat
    from worker.contract.given_picture import Given
    from worker.state.awaiting import Awaiting
    from worker.state.failures import Failures
    from worker.state.fleet import Fleet
    from worker.state.previews import Previews
    from worker.state.records import Records
    from worker.storage.bucket import Bucket

#: Tries of a request to a bucket: somebody waits for it, so a few seconds and not the minute a worker has.
ATTEMPTS = 4
#: Seconds that a feeder tries to reach Redis before it gives up. A run that takes hours outlives a restart.
FEEDER_RETRY_S = 60.0

#: Seconds that `repr` of a handle waits for Redis, at most, and that it then does not ask it again.
_REPR_S, _REPR_PAUSE_S = 0.5, 5.0
#: boto3's own variables, as sorted (name, value) pairs.
_Variables = tuple[tuple[str, str], ...]

#: Held while a session or a bucket is made, so that there is one of each.
_lock = threading.Lock()


class Session:
    """One Redis and the buckets, as a producer sees them. Thread-safe."""

    def __init__(self, settings: ProducerSettings, redis_retry_s: float, variables: _Variables) -> None:
        self.settings = settings
        #: Seconds that a command is sent again while Redis is out of reach.
        self.redis_retry_s = redis_retry_s
        self._variables = variables

    @functools.cached_property
    def redis(self) -> Redis:
        """The client of `REDIS_URL`."""
        from worker.state.redis_client import connect

        return connect(self.settings.redis_url, self.redis_retry_s)

    @functools.cached_property
    def records(self) -> Records:
        """The jobs' records."""
        from worker.state.records import Records

        return Records(self.redis, self.settings.record_ttl_s)

    @functools.cached_property
    def awaiting(self) -> Awaiting:
        """Waits for jobs on event loops."""
        from worker.state.awaiting import Awaiting

        return Awaiting(self.settings.redis_url, self.redis_retry_s)

    @functools.cached_property
    def failures(self) -> Failures:
        """The jobs that failed for good."""
        from worker.state.failures import Failures

        return Failures(self.redis)

    @functools.cached_property
    def fleet(self) -> Fleet:
        """The workers."""
        from worker.state.fleet import Fleet

        return Fleet(self.redis, self.settings.record_ttl_s)

    @functools.cached_property
    def previews(self) -> Previews:
        """Previews of jobs that are rendered."""
        from worker.state.previews import Previews

        return Previews(self.redis)

    @property
    def bucket(self) -> Bucket | None:
        """The bucket of `S3_BUCKET` and `S3_PREFIX`; None where that is not set."""
        return self.bucket_named(self.settings.s3_bucket) if self.settings.s3_bucket else None

    def lasting(self, job_id: str, tenant: str | None = None) -> JobRecord | None:
        """The record of a job that is done, from the bucket; None where it is not there.

        `tenant`: whose job it is; None: `SMALLCAT_TENANT`'s.

        Raises `StorageError`; `UnknownJobError` where it is not this job's.
        """
        bucket = self.bucket
        if bucket is None:
            return None
        tenant = self.settings.tenant if tenant is None else tenant
        try:
            stored = bucket.record(job_id, tenant)
        except PermanentStorageError as error:
            raise PermanentStorageError(
                f"The record of job {job_id} is not in Redis, where that of a finished job stays for an "
                f"hour, and cannot be read from the bucket: {error}"
            ) from error
        if stored is None:
            return None
        try:
            record = JobRecord.model_validate_json(stored)
        except ValueError:
            record = None
        is_of = record is not None and (record.id, record.job.tenant) == (job_id, tenant)
        if record is None or not is_of or record.state is not State.DONE:
            raise UnknownJobError(
                f"The record of job {job_id} in the bucket cannot be read: submit the job again."
            )
        # It was written before the last step was reported.
        return record.model_copy(update={"step": record.steps})

    def latest(self, count: int, tenant: str | None = None, owner: str = "") -> list[JobRecord]:
        """The records of up to `count` of the jobs that were submitted last, the latest first.

        `tenant`: those that it has submitted; empty: those of no tenant; None: all. `owner` is the tenant
        that its jobs say where that is another one. Those of finished jobs that Redis has no longer are read
        from the bucket. Where that cannot be read, they are left out, and a warning says why.
        """
        from concurrent.futures import ThreadPoolExecutor

        listed = self.records.latest(tenant or "")
        if tenant == "":
            listed = [each for each in listed if not each[1]]
        submitted_at = {job_id: at for job_id, _, at in listed}
        owners = {job_id: owner or of for job_id, of, _ in listed}
        ids, found = list(submitted_at), list[JobRecord]()
        reads = self.bucket is not None
        while ids and len(found) < count:
            part, ids = ids[:count], ids[count:]
            known = self.records.read(part)
            missing = [job_id for job_id in part if job_id not in known] if reads else []
            try:
                with ThreadPoolExecutor(8) as threads:
                    read = threads.map(self._stored, missing, [owners[job_id] for job_id in missing])
                    stored = dict(zip(missing, read, strict=True))
            except StorageError as error:
                warnings.warn(plain(str(error)), stacklevel=2)
                stored, reads = {}, False
            records = [known.get(job_id) or stored.get(job_id) for job_id in part]
            found += [record for record in records if record is not None]
        return [
            record
            if record.submitted_at
            else record.model_copy(update={"submitted_at": submitted_at[record.id]})
            for record in found[:count]
        ]

    def _stored(self, job_id: str, tenant: str) -> JobRecord | None:
        with contextlib.suppress(UnknownJobError):
            return self.lasting(job_id, tenant)
        return None

    def given(
        self,
        fields: Mapping[str, Any],
        tenant: str,
        folder: Path | None = None,
        picture_of: Callable[[str, str], InputReference] | None = None,
    ) -> Given | None:
        """The fields of a job of `tenant` with its pictures read, wherever they are; None: it has none.

        `folder`: see `worker.contract.given_picture.Reach`; `picture_of` says what a job's id means for the
        field of that name, where it is not its picture as it is known now. Raises `InvalidJobError`,
        `StorageError`.
        """
        pictures = (fields.get("image"), fields.get("mask"))
        if all(each is None or (isinstance(each, str) and not each.strip()) for each in pictures):
            return None
        # Loads Pillow.
        from worker.contract.given_picture import Reach, read_given
        from worker.storage.refusals import is_no_bucket

        def fetch(uri: str, name: str) -> bytes:
            bucket = self.bucket_of(uri)
            try:
                with bucket.open(uri) as body:
                    return body.read(MAX_INPUT_BYTES + 1)
            except (UnknownJobError, ValueError) as error:
                raise InvalidJobError(f"{name} cannot be read: {error}") from None
            except PermanentStorageError as error:
                if bucket.name == self.settings.s3_bucket or not is_no_bucket(error):
                    raise
                raise InvalidJobError(
                    f'{name} is {uri}, and there is no bucket "{bucket.name}": check the address.'
                ) from None

        def known_picture(job_id: str, name: str) -> InputReference:
            return self.picture_of(job_id, tenant, name)[0]

        return read_given(fields, Reach(fetch, picture_of or known_picture, folder or Path()))

    def picture_of(self, job_id: str, tenant: str, name: str = "image") -> tuple[InputReference, bool]:
        """The reference to the picture of another job of `tenant`, for the field `name`; whether it is done.

        Raises `InvalidJobError`, `QueueError`, `StorageError`.
        """
        is_of = f"{name} is the picture of job {job_id}"
        with self.queue_errors():
            record = self.records.read([job_id]).get(job_id)
        record = record or self.lasting(job_id, tenant)
        if record is None or record.job.tenant != tenant:
            raise unknown_picture(name, job_id)
        if record.state in (State.FAILED, State.CANCELLED):
            raise InvalidJobError(
                f"{is_of}, which {'has failed' if record.state is State.FAILED else 'was cancelled'}: submit "
                "that job again first."
            )
        width, height = record.job.picture_size
        if not width or not height:
            raise InvalidJobError(
                f"{is_of}, whose size is not known, as no worker of its model has run: submit that job with "
                "a width and a height, or wait until it is done."
            )
        return InputReference("job", job_id, width, height), record.state is State.DONE

    def store(self, given: Given, tenant: str) -> None:
        """Put the files of a job into the bucket, unless they are there.

        Raises `InvalidJobError` for one that is named and not there, `StorageError`.
        """
        if not (given.files or given.named):
            return  # Of other jobs' pictures nothing is stored.
        if self.bucket is None:
            raise StorageError("S3_BUCKET is not set: name the bucket, from which workers read pictures.")
        from worker.storage.inputs import Inputs

        inputs = Inputs(self.bucket)
        for file in given.files:
            inputs.put(file.data, file.mime, tenant)
        for reference in given.named:
            if not inputs.renew(reference.id, tenant):
                raise InvalidJobError(
                    f"There is no file {reference.id[:12]}... among the bucket's inputs: give the picture."
                )

    def bucket_named(self, name: str) -> Bucket:
        """The bucket of that name. Each has one client, whoever asks."""
        prefix = self.settings.s3_prefix if name == self.settings.s3_bucket else ""
        with _lock:
            return _bucket(name, prefix, BucketOptions.of(self.settings), self._variables)

    def address_of(self, job_id: str, image_format: ImageFormat, said: str, tenant: str = "") -> str:
        """The address of a job's picture, which follows from the job, `S3_BUCKET` and `S3_PREFIX`.

        `said` is what its record says, which anybody who submits jobs can write. Where it differs, as in a
        copy of the bucket, a warning says so. Without `S3_BUCKET` it counts, if it ends as this job's address
        does; else raises `UnknownJobError`.
        """
        if self.bucket is not None:
            if (follows := self.bucket.uri(job_id, image_format, tenant)) != said:
                warnings.warn(
                    f"The record of job {job_id} says {plain(said)}; {follows} is used, as S3_BUCKET and "
                    "S3_PREFIX say: set them as the workers have them.",
                    stacklevel=4,
                )
            return follows
        bucket, _, key = said.removeprefix("s3://").partition("/")
        name = object_key(job_id, image_format, tenant)
        if not said.startswith("s3://") or not bucket or f"/{key}".removesuffix(f"/{name}") == f"/{key}":
            raise UnknownJobError(
                f"The record of job {job_id} says {plain(said)}, which is no address of its picture: set "
                "S3_BUCKET and S3_PREFIX as the workers have them."
            )
        return said

    def bucket_of(self, uri: str) -> Bucket:
        """The bucket that s3://bucket/key lies in."""
        return self.bucket_named(urlsplit(uri).netloc)

    def queue_errors(self) -> AbstractContextManager[None]:
        """Turns redis-py's and kombu's errors into `QueueError`."""
        from worker.state.redis_client import queue_errors

        return queue_errors(self.settings.redis_url)

    def reconnect(self) -> None:
        """Close idle connections to Redis: with Sentinel, the next ones go to the primary of then."""
        self.redis.connection_pool.disconnect(inuse_connections=False)

    def one_retry(self, seconds: float | None = None) -> AbstractContextManager[object]:
        """All commands inside together are sent again for at most `seconds`; None: `redis_retry_s`."""
        from worker.state.redis_client import within

        return within(self.redis_retry_s if seconds is None else seconds)


def unknown_picture(name: str, job_id: str) -> InvalidJobError:
    """The error for the field `name`, which is the picture of a job that nobody knows."""
    return InvalidJobError(
        f"{name} is the picture of job {job_id}, which is not known: check the id. If it is right, submit "
        "that job again first."
    )


def session(redis_retry_s: float | None = None) -> Session:
    """The session for the environment as it is now; a changed one gets a session of its own.

    `redis_retry_s` is how many seconds a command is sent again while Redis is out of reach; not given:
    `SMALLCAT_SUBMIT_TIMEOUT_S`. Raises `SettingsError`.
    """
    settings = producer_settings()
    variables = tuple(sorted(each for each in os.environ.items() if each[0].startswith("AWS_")))
    retry_s = settings.submit_timeout_s if redis_retry_s is None else redis_retry_s
    with _lock:
        return _session(settings, retry_s, variables)


@functools.lru_cache(maxsize=8)
def _session(settings: ProducerSettings, redis_retry_s: float, variables: _Variables) -> Session:
    return Session(settings, redis_retry_s, variables)


@functools.lru_cache(maxsize=16)
def _bucket(name: str, prefix: str, options: BucketOptions, variables: _Variables) -> Bucket:
    """`variables` are part of the key alone: boto3 reads the environment."""
    from worker.storage.bucket import Bucket

    return Bucket(name, prefix, attempts=ATTEMPTS, options=options)


class ShortLookUp:
    """Reads jobs' states for `repr`, one at a time: never raises, and waits for at most `_REPR_S` seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Monotonic seconds until which a Redis that did not answer is not asked again.
        self._silent_until = -math.inf

    def state(self, job_id: str, submission: str) -> str:
        """The submission's state, or "unknown"."""
        if time.monotonic() < self._silent_until:
            return "unknown"
        with contextlib.suppress(Exception):
            _ = session().redis  # Imports redis-py: that takes a while, but waits for nobody.
        until = time.monotonic() + _REPR_S
        if not self._lock.acquire(timeout=_REPR_S):
            return "unknown"
        found: list[str] = []
        # In a thread, because the look-up of a host's name takes no time limit.
        thread = threading.Thread(
            target=self._read, args=(job_id, submission, found), name="state for repr", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # The interpreter is ending, or there are too many threads.
            self._lock.release()
            return "unknown"
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            self._silent_until = time.monotonic() + _REPR_PAUSE_S
        return found[0] if found else "unknown"

    def _read(self, job_id: str, submission: str, found: list[str]) -> None:
        try:
            now = session()
            with now.one_retry(_REPR_S):
                found.append(str(now.records.get(job_id, submission).state))
        except Exception:  # noqa: S110, BLE001 - a log or a debugger must not fail for what it shows
            pass
        finally:
            self._lock.release()


short_look_up = ShortLookUp()
