"""The S3 bucket with the pictures.

    PREFIX/images/<id[:2]>/<id>.png     the picture (or .webp, .jpeg), put first
    PREFIX/images/<id[:2]>/<id>.json    the job's lasting record, put last
    PREFIX/images/tenants/<tenant>/...  both of a job that has a tenant
    PREFIX/inputs/...                   the files that jobs begin with (`worker.storage.inputs`)

A job is done when its record is there. When a worker dies between the two, or a full storage refuses one of
them, there is no record, and the job's next attempt puts both. The picture is larger than the record, so a
storage that fills up refuses it before anything is written. A worker deletes nothing to clean up: another
one may be putting the same job.

The keys follow from the job's id, so putting a job twice writes the same objects. Any S3-compatible server
will do: If-None-Match and newer checksums, which some ignore or refuse, are not needed.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import IO, TYPE_CHECKING, NamedTuple, cast

import botocore.exceptions

from worker.contract.choices import ImageFormat
from worker.contract.errors import PermanentStorageError, StorageError, UnknownJobError
from worker.contract.input_reference import MAX_INPUT_BYTES
from worker.contract.job import Job
from worker.contract.object_keys import input_key, object_key
from worker.storage.client import KeyFiles, is_aws, make_client, region_of
from worker.storage.input_pixels import InputPixels, read_pixels
from worker.storage.options import BucketOptions
from worker.storage.refusals import DENIED, code_of, storage_errors

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Seconds that a presigned link is valid at most: S3's limit.
MAX_URL_S = 604_800
#: Begins the names of test objects. They lie where pictures do, because rights may be given for that folder.
TEST_NAME = "images/.smallcat-check-"
#: Seconds until AWS is asked again for the region of a bucket that it did not name.
ASK_AGAIN_S = 60.0
#: What HEAD and GET answer where nothing is.
MISSING = frozenset({"NoSuchKey", "NotFound", "404"})


class StoredObject(NamedTuple):
    """An object as a listing has it."""

    #: Its address.
    uri: str
    #: When it was put, Unix seconds.
    put_at: float
    #: Bytes.
    size: int
    #: Another one when the object is another one: its ETag, size and time. The ETag alone does not say it for
    #: each encryption, nor the time alone, which S3 rounds to seconds.
    version: str


class Bucket:
    """One bucket. Thread-safe: it has one boto3 client, which is.

    `connections`: requests at once, at most. `attempts`: how often a request is tried while the server is out
    of reach or overloaded; 8 take about a minute, 2 about a second. `options`: what all objects have in
    common. Credentials, endpoint and region are boto3's own settings; keys in files are read again when these
    change.
    """

    def __init__(
        self,
        name: str,
        prefix: str = "",
        *,
        connections: int = 16,
        attempts: int = 8,
        options: BucketOptions = BucketOptions(),  # noqa: B008 - frozen
    ) -> None:
        self.name = name
        self._prefix = f"{prefix}/" if prefix else ""
        self._connections = connections
        self._attempts = attempts
        self._options = options
        self._lock = threading.Lock()
        self._made: S3Client | None = None
        #: The files of keys, and their version when `_made` was made.
        self._key_files: KeyFiles | None = None
        self._keys_version: object = None
        #: Clients for links by region of AWS, where that is not the one of `_made`.
        self._link_clients: dict[str, S3Client] = {}
        #: The region of AWS that a bucket is in, and when to ask again where AWS did not say.
        self._regions: dict[str, tuple[str | None, float]] = {}
        self._asking = threading.Lock()
        #: Whether S3 is known to refuse what is missing, as it does without the right to list.
        self._hides_missing = False
        self._learning = threading.Lock()

    @property
    def _client(self) -> S3Client:
        with self._lock:  # Using a client is thread-safe; making one is not.
            if self._key_files is None:
                self._key_files = KeyFiles()
            if self._made is None or self._keys_version != self._key_files.version():
                # Before it is made: keys that are written meanwhile make another one.
                self._keys_version = self._key_files.version()
                self._made = self._make_client()
                self._link_clients.clear()
            return self._made

    def _make_client(self, region: str | None = None) -> S3Client:
        return make_client(
            addressing=self._options.addressing,
            connections=self._connections,
            attempts=self._attempts,
            region=region,
        )

    def check(self, look: Callable[[str], object] = lambda uri: None) -> tuple[str, ...]:
        """Raise `StorageError` with the remedy unless the bucket exists and can be written and read.

        `look` is called with the address of a test object while that is there. Returns a sentence for each
        right that is missing and that a worker can do without.
        """
        if not self.name:
            raise PermanentStorageError("S3_BUCKET is not set: name the bucket for the pictures.")
        lacks = self.probe(look=look)
        with self._errors():
            try:
                self._client.head_bucket(Bucket=self.name)
            except botocore.exceptions.ClientError as error:
                if code_of(error) not in DENIED:
                    raise
                need = "which only galleries of an s3:// address need"
                lacks += (f"Objects cannot be listed, {need}: s3:ListBucket is missing.",)
        return lacks

    def probe(self, size: int = 8, look: Callable[[str], object] = lambda uri: None) -> tuple[str, ...]:
        """Put, read and remove a test object of `size` bytes, in the way that pictures are put.

        `look`, result and errors as those of `check`.
        """
        # A random name: workers that start together must not delete each other's object.
        key = f"{self._prefix}{TEST_NAME}{secrets.token_hex(8)}"
        self._put(key, b"smallcat".ljust(size, b".")[:size], "application/octet-stream", is_test=True)
        with self._errors():
            try:
                self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
                look(f"s3://{self.name}/{key}")
            finally:
                refused = self._remove(key)
        if refused is not None:
            return (f"The test object {key} cannot be removed, which no job needs: {refused}",)
        return ()

    @property
    def root(self) -> str:
        """The s3:// address below which all objects are."""
        return f"s3://{self.name}/{self._prefix}"

    def uri(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> str:
        """The address of the job's picture, whether it is there yet or not."""
        return f"s3://{self.name}/{self._key(job_id, image_format, tenant)}"

    def put(
        self,
        job_id: str,
        image_format: ImageFormat,
        picture: bytes,
        record: bytes,
        mime: str,
        tenant: str = "",
    ) -> None:
        """Store the picture, then the record; the server checks each by its MD5. Raises `StorageError`."""
        self._put(self._key(job_id, image_format, tenant), picture, mime)
        self._put(self._key(job_id, "json", tenant), record, "application/json")

    def find(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        """The stored record of a job whose picture is there, too; else None. Raises `StorageError`."""
        record = self.record(job_id, tenant)
        # Somebody may have deleted the picture alone.
        is_there = record is not None and self._is_there(self._key(job_id, image_format, tenant))
        return record if is_there else None

    def record(self, job_id: str, tenant: str = "") -> bytes | None:
        """The stored record of a job, or None. Raises `StorageError`."""
        key = self._key(job_id, "json", tenant)
        with self._errors():
            try:
                return self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
            except botocore.exceptions.ClientError as error:
                if self._says_missing(error):
                    return None
                raise

    def has_record(self, job_id: str, tenant: str = "") -> bool:
        """Whether a job is done, by what the bucket has of it. Raises `StorageError`."""
        return self.record(job_id, tenant) is not None

    def read_input(self, sha256: str, tenant: str = "") -> bytes | None:
        """The file that jobs begin with, as it is there: its reader compares its hash. None: it is gone.

        No more is read than a byte above an input's limit. Raises `StorageError`.
        """
        return self._bytes(f"{self._prefix}{input_key(sha256, tenant)}")

    def picture(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        """A job's picture, up to as many bytes; None: it is not there. Raises `StorageError`."""
        return self._bytes(self._key(job_id, image_format, tenant))

    def _bytes(self, key: str) -> bytes | None:
        with self._errors():
            try:
                found = self._client.get_object(Bucket=self.name, Key=key)
            except botocore.exceptions.ClientError as error:
                if self._says_missing(error):
                    return None
                raise
            with closing(found["Body"]) as body:
                data = body.read(MAX_INPUT_BYTES + 1)
        if len(data) < (size := min(found.get("ContentLength", 0), MAX_INPUT_BYTES + 1)):
            # botocore compares the two where all is read alone.
            raise StorageError(f"The storage broke off after {len(data):,} of {size:,} bytes of {key}.")
        return data

    def pixels_of(self, job: Job) -> InputPixels:
        """The pixels of what a job with an image begins with. Raises `InputError`, `StorageError`."""
        return read_pixels(self, job)

    def get(self, uri: str) -> bytes:
        """The bytes at an s3:// address. Raises `UnknownJobError` where nothing is, `StorageError`."""
        with self.open(uri) as body:
            return body.read()

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        """The bytes at an s3:// address, as a stream. Raises as `get`, also while it is read."""
        bucket, key = _split(uri)
        with self._errors():
            try:
                body = cast("IO[bytes]", self._client.get_object(Bucket=bucket, Key=key)["Body"])
            except botocore.exceptions.ClientError as error:
                if code_of(error) in MISSING:
                    raise UnknownJobError(f"Nothing is at {uri}: it was deleted, or never put.") from None
                raise
            yield body

    def url(self, uri: str, expires_s: int = 3_600) -> str:
        """A link to an s3:// address that is valid without keys for `expires_s` seconds (1 to 604,800)."""
        if not 1 <= expires_s <= MAX_URL_S:
            raise ValueError(f"expires_s is {expires_s}: S3 allows 1 to {MAX_URL_S:,} seconds.")
        bucket, key = _split(uri)
        with self._errors():
            return self._link_client(bucket).generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_s
            )

    def below(self, address: str) -> Iterator[tuple[str, float]]:
        """The objects under s3://bucket/prefix, in order of their keys: address, and Unix time of the put.

        A prefix is a folder: "runs/1" does not contain "runs/10". Raises `StorageError`.
        """
        return ((each.uri, each.put_at) for each in self.listed(address))

    def listed(self, address: str) -> Iterator[StoredObject]:
        """The same, with what else the listing says of each."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        with self._errors():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for stored in page.get("Contents", ()):
                    put_at = stored["LastModified"].timestamp()
                    size = stored.get("Size", 0)
                    version = f"{stored.get('ETag', '')} {size} {put_at:.3f}"
                    yield StoredObject(f"s3://{bucket}/{stored['Key']}", put_at, size, version)

    def delete(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> None:
        """Delete a job's picture and record, if they are there. Raises `StorageError`."""
        with self._errors():
            # The record first: a job with a record is done.
            for key in (self._key(job_id, "json", tenant), self._key(job_id, image_format, tenant)):
                self._client.delete_object(Bucket=self.name, Key=key)

    def _key(self, job_id: str, ending: str, tenant: str = "") -> str:
        return f"{self._prefix}{object_key(job_id, ending, tenant)}"

    def _is_there(self, key: str) -> bool:
        with self._errors():
            try:
                self._client.head_object(Bucket=self.name, Key=key)
            except botocore.exceptions.ClientError as error:
                if self._says_missing(error):
                    return False
                raise
        return True

    def _says_missing(self, error: botocore.exceptions.ClientError) -> bool:
        """Whether the answer to reading an object of this bucket says that there is none."""
        if code_of(error) in MISSING:
            return True
        if code_of(error) not in DENIED:
            return False
        with self._learning:  # Once, and not by all threads at the first jobs.
            self._hides_missing = self._hides_missing or self._is_missing_denied()
        return self._hides_missing

    def _is_missing_denied(self) -> bool:
        """Whether what is missing is refused although what is there can be read: by trying both."""
        try:
            self._client.get_object(Bucket=self.name, Key=f"{self._prefix}{TEST_NAME}{secrets.token_hex(8)}")
        except botocore.exceptions.ClientError as error:
            if code_of(error) not in DENIED:
                return False
        # Without the right to put, nobody can tell.
        with suppress(PermanentStorageError):
            self.probe()
            return True
        return False

    def _put(self, key: str, body: bytes, mime: str, *, is_test: bool = False) -> None:
        # Buckets with Object Lock demand the MD5.
        md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        parameters = self._options.put_parameters(datetime.datetime.now(datetime.UTC), is_test=is_test)
        with self._errors():
            self._client.put_object(
                Bucket=self.name, Key=key, Body=body, ContentType=mime, ContentMD5=md5, **parameters
            )

    def _remove(self, key: str) -> botocore.exceptions.ClientError | None:
        """Remove a test object. Returns the refusal where these keys may not, or retention forbids it."""
        try:
            self._client.delete_object(Bucket=self.name, Key=key)
        except botocore.exceptions.ClientError as error:
            return error
        return None

    def _link_client(self, bucket: str) -> S3Client:
        """The client that signs links to a bucket. At the first one, AWS is asked for the bucket's region."""
        client = self._client
        if not is_aws(client):
            return client
        with self._asking:  # Not `_lock`: other requests need not wait for the answer.
            region, again_s = self._regions.get(bucket, (None, 0.0))
            if region is None and time.monotonic() >= again_s:
                region = region_of(bucket, client)
                self._regions[bucket] = region, time.monotonic() + ASK_AGAIN_S
            if region in (None, client.meta.region_name):
                return client
            with self._lock:
                if region not in self._link_clients:
                    self._link_clients[region] = self._make_client(region)
                return self._link_clients[region]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with storage_errors(self.name):
                yield
        except PermanentStorageError:
            # The next client has the keys that boto3 finds then: a file of keys may have been written again.
            with self._lock:
                self._made = None
                self._link_clients.clear()
            raise


def _split(uri: str) -> tuple[str, str]:
    # Not by urllib: "#" and "?" are ordinary characters of a key.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket or not key:
        raise ValueError(f"{uri!r} is no s3://bucket/key address.")
    return bucket, key
