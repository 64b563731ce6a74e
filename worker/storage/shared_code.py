"""Where a fleet keeps its compiled code: a folder that its machines share, or a prefix of a bucket.

    FOLDER/NAME                 SMALLCAT_KERNEL_CACHE=FOLDER
    s3://BUCKET/PREFIX/NAME     SMALLCAT_KERNEL_CACHE=s3://BUCKET/PREFIX

What a file holds and who has signed it is `worker.device.compiling.kernel_cache`'s matter. Whoever reads
finds a whole file or none. Nothing here deletes: a lifecycle rule of the bucket may, by age
(`deploy/s3-lifecycle.json`).
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, cast

import botocore.exceptions

from worker.contract.errors import PermanentStorageError, StorageError
from worker.contract.given_file import at_home
from worker.storage.bucket import MISSING, Bucket
from worker.storage.options import BucketOptions
from worker.storage.refusals import DENIED, code_of

if TYPE_CHECKING:
    from worker.contract.settings import WorkerSettings

logger = logging.getLogger("smallcat.storage")

#: Why code is shared, or not although it should be, in the log.
SHARED: Final = "SMALLCAT_KERNEL_CACHE"
NO_KEY: Final = "there is no SMALLCAT_KERNEL_CACHE_KEY to sign it with"
#: Bytes of a file, at most, and of what is read at once.
MOST_BYTES: Final = 512 << 20
_PIECE: Final = 1 << 20
#: Seconds that a download may take, and requests that are made of one while the server is out of reach.
DOWNLOAD_S: Final = 120.0
ATTEMPTS: Final = 2


class Folder:
    """Files in a folder, which several machines may share."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def get(self, name: str) -> bytes | None:
        """A file; None: there is none. Raises `OSError`, also for no regular file, or over `MOST_BYTES`."""
        try:
            with open(self._path / name, "rb", opener=_opened_at_once) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise OSError(f"{name} is no regular file")
                content = b"" if found.st_size > MOST_BYTES else file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            return None
        if max(found.st_size, len(content)) > MOST_BYTES:
            raise OSError(_too_large(name))
        return content

    def put(self, name: str, content: bytes) -> None:
        """Keep a file, in the place of another one of this name. Raises alike."""
        if len(content) > MOST_BYTES:
            raise OSError(_too_large(name))
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by the process' number: those of two machines, or containers, may be the same.
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


class InBucket:
    """Files in a bucket, below a prefix. Thread-safe. Raises `StorageError`."""

    def __init__(self, bucket: Bucket, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns monotonic seconds."""
        self._bucket = bucket
        self._options = bucket._options.for_inputs()
        self._clock = clock

    def __str__(self) -> str:
        return self._bucket.root.rstrip("/")

    def get(self, name: str) -> bytes | None:
        """A file; None: there is none. Raises also where it has too many bytes, or takes too long."""
        with self._bucket._errors():
            try:
                found = self._bucket._client.get_object(Bucket=self._bucket.name, Key=self._key(name))
            except botocore.exceptions.ClientError as error:
                if code_of(error) in MISSING:
                    return None
                if code_of(error) not in DENIED:
                    raise
                # As S3 answers without the right to list. Where the right to read lacks, nothing is found.
                logger.info("%s/%s is not there, or these keys may not read it", self, name)
                return None
            with closing(found["Body"]) as body:
                return self._read(name, cast("IO[bytes]", body))

    def put(self, name: str, content: bytes) -> None:
        """Keep a file, in the place of another one of this name. The server checks it by its MD5."""
        if len(content) > MOST_BYTES:
            raise PermanentStorageError(_too_large(name))
        md5 = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        with self._bucket._errors():
            self._bucket._client.put_object(
                Bucket=self._bucket.name,
                Key=self._key(name),
                Body=content,
                ContentType="application/octet-stream",
                ContentMD5=md5,
                **self._options.put_parameters(datetime.datetime.now(datetime.UTC)),
            )

    def _read(self, name: str, body: IO[bytes]) -> bytes:
        content, until_s = bytearray(), self._clock() + DOWNLOAD_S
        while piece := body.read(_PIECE):
            content += piece
            if len(content) > MOST_BYTES:
                raise PermanentStorageError(_too_large(name))
            if self._clock() > until_s:
                raise StorageError(f"{name} was not there after {DOWNLOAD_S:.0f} s: {len(content):,} bytes.")
        return bytes(content)

    def _key(self, name: str) -> str:
        return f"{self._bucket._prefix}{name}"


def store_of(settings: WorkerSettings) -> Folder | InBucket | None:
    """Where the settings say that the fleet's code is; None: nowhere, or there is no key to sign it with."""
    if not settings.kernel_cache or not settings.kernel_cache_key:
        return None
    if not settings.kernel_cache.startswith("s3://"):
        return Folder(at_home(Path(settings.kernel_cache)))
    bucket, _, prefix = settings.kernel_cache.removeprefix("s3://").partition("/")
    options = BucketOptions.of(settings)
    return InBucket(Bucket(bucket, prefix.strip("/"), connections=2, attempts=ATTEMPTS, options=options))


def _opened_at_once(path: str, flags: int) -> int:
    """Also a pipe that somebody has put there, without a wait for who writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _too_large(name: str) -> str:
    return f"{name} has more than {MOST_BYTES >> 20:,} MiB, the limit for compiled code."
