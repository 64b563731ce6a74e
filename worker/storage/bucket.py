"""The S3 bucket with the pictures. No other module imports boto3.

    PREFIX/images/<id[:2]>/<id>.png     the picture (or .webp, .jpeg), put first
    PREFIX/images/<id[:2]>/<id>.json    the job's lasting record, put last

A job is done when its record is there. When a worker dies between the two, or a full storage refuses one of
them, there is no record, and the job's next attempt puts both. The picture is larger than the record, so a
storage that fills up refuses it before anything is written. A worker deletes nothing to clean up: another
one may be putting the same job.

The keys follow from the job's id, so putting a job twice writes the same objects. Any S3-compatible server
will do: If-None-Match and newer checksums, which some ignore or refuse, are not needed.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import IO, TYPE_CHECKING, cast

import boto3
import botocore.config
import botocore.exceptions

from worker.contract.errors import PermanentStorageError, StorageError, UnknownJobError
from worker.contract.job import ImageFormat

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Seconds that a presigned link is valid at most: S3's limit.
MAX_URL_S = 604_800

#: Error codes that last, however often the request is repeated, and the remedy for each.
_PERMANENT = {
    "NoSuchBucket": "create it, or set S3_BUCKET",
    "404": "create it, or set S3_BUCKET",
    "AccessDenied": "give these keys read and write on it",
    "403": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "Forbidden": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "InsufficientStorage": "make room on the storage",
    "507": "make room on the storage",
    "QuotaExceeded": "make room on the storage",
    "XMinioStorageFull": "make room on the storage",
}


class Bucket:
    """One bucket. Thread-safe: it has one boto3 client, which is.

    `connections`: requests at once, at most. `attempts`: how often a request is tried while the server is out
    of reach or overloaded; 8 take about a minute, 2 about a second. Credentials, endpoint and region are
    boto3's own settings.
    """

    def __init__(self, name: str, prefix: str = "", *, connections: int = 16, attempts: int = 8) -> None:
        self.name = name
        self._prefix = f"{prefix}/" if prefix else ""
        self._connections = connections
        self._attempts = attempts
        self._lock = threading.Lock()

    @cached_property
    def _client(self) -> S3Client:
        config = botocore.config.Config(
            # By default links for custom endpoints are signed by version 2, which rclone and Garage refuse.
            signature_version="s3v4",
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "max_attempts": self._attempts},
            max_pool_connections=self._connections,
            connect_timeout=5,
            read_timeout=30,
        )
        with self._lock:  # Using a client is thread-safe; making one is not.
            return boto3.session.Session().client("s3", config=config)

    def check(self) -> None:
        """Raise `StorageError` with the remedy unless the bucket exists and can be read and written."""
        if not self.name:
            raise StorageError("S3_BUCKET is not set: name the bucket for the pictures.")
        # A random name: workers that start together must not delete each other's object.
        key = f"{self._prefix}.smallcat-check-{secrets.token_hex(8)}"
        with self._errors():
            self._client.head_bucket(Bucket=self.name)
            self._client.put_object(Bucket=self.name, Key=key, Body=b"smallcat")
            self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
            self._client.delete_object(Bucket=self.name, Key=key)

    @property
    def root(self) -> str:
        """The s3:// address below which all objects are."""
        return f"s3://{self.name}/{self._prefix}"

    def uri(self, job_id: str, image_format: ImageFormat) -> str:
        """The address of the job's picture, whether it is there yet or not."""
        return f"s3://{self.name}/{self._key(job_id, image_format)}"

    def put(self, job_id: str, image_format: ImageFormat, picture: bytes, record: bytes, mime: str) -> None:
        """Store the picture, then the record; the server checks each by its MD5. Raises `StorageError`."""
        self._put(self._key(job_id, image_format), picture, mime)
        self._put(self._key(job_id, "json"), record, "application/json")

    def find(self, job_id: str, image_format: ImageFormat) -> bytes | None:
        """The stored record of a job whose picture is there, too; else None. Raises `StorageError`."""
        record = self.record(job_id)
        # Somebody may have deleted the picture alone.
        return record if record is not None and self._is_there(self._key(job_id, image_format)) else None

    def record(self, job_id: str) -> bytes | None:
        """The stored record of a job, or None. Raises `StorageError`."""
        with self._errors():
            try:
                return self._client.get_object(Bucket=self.name, Key=self._key(job_id, "json"))["Body"].read()
            except self._client.exceptions.NoSuchKey:
                return None

    def get(self, uri: str) -> bytes:
        """The bytes at an s3:// address. Raises `UnknownJobError` where nothing is, `StorageError`."""
        bucket, key = _split(uri)
        with self._errors():
            try:
                return self._client.get_object(Bucket=bucket, Key=key)["Body"].read()
            except self._client.exceptions.NoSuchKey:
                raise UnknownJobError(f"Nothing is at {uri}: it was deleted, or never put.") from None

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        """The bytes at an s3:// address, as a stream. Raises as `get`, also while it is read."""
        bucket, key = _split(uri)
        with self._errors():
            try:
                yield cast("IO[bytes]", self._client.get_object(Bucket=bucket, Key=key)["Body"])
            except self._client.exceptions.NoSuchKey:
                raise UnknownJobError(f"Nothing is at {uri}: it was deleted, or never put.") from None

    def url(self, uri: str, expires_s: int = 3_600) -> str:
        """A link to an s3:// address that is valid without keys for `expires_s` seconds (1 to 604,800)."""
        if not 1 <= expires_s <= MAX_URL_S:
            raise ValueError(f"expires_s is {expires_s}: S3 allows 1 to {MAX_URL_S:,} seconds.")
        bucket, key = _split(uri)
        with self._errors():
            return self._client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_s
            )

    def below(self, address: str) -> Iterator[tuple[str, float]]:
        """The objects under s3://bucket/prefix, in order of their keys: address, and Unix time of the put.

        A prefix is a folder: "runs/1" does not contain "runs/10". Raises `StorageError`.
        """
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        with self._errors():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for stored in page.get("Contents", ()):
                    yield f"s3://{bucket}/{stored['Key']}", stored["LastModified"].timestamp()

    def delete(self, job_id: str, image_format: ImageFormat) -> None:
        """Delete a job's picture and record, if they are there. Raises `StorageError`."""
        with self._errors():
            # The record first: a job with a record is done.
            for key in (self._key(job_id, "json"), self._key(job_id, image_format)):
                self._client.delete_object(Bucket=self.name, Key=key)

    def _key(self, job_id: str, ending: str) -> str:
        return f"{self._prefix}images/{job_id[:2]}/{job_id}.{ending}"

    def _is_there(self, key: str) -> bool:
        with self._errors():
            try:
                self._client.head_object(Bucket=self.name, Key=key)
            except botocore.exceptions.ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                    return False
                raise
        return True

    def _put(self, key: str, body: bytes, mime: str) -> None:
        md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        with self._errors():
            self._client.put_object(Bucket=self.name, Key=key, Body=body, ContentType=mime, ContentMD5=md5)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn botocore's errors into one `StorageError` with the cause and the remedy."""
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
            if remedy := _PERMANENT.get(code):
                raise PermanentStorageError(
                    f'The bucket "{self.name}" refuses ({code} {message}): {remedy}.'
                ) from error
            raise StorageError(f'The bucket "{self.name}" fails ({code} {message}).') from error
        except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
            raise PermanentStorageError(
                f"The bucket needs keys ({error}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from error
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise StorageError(
                f'The bucket "{self.name}" is out of reach ({error}): check AWS_ENDPOINT_URL_S3.'
            ) from error


def _split(uri: str) -> tuple[str, str]:
    # Not by urllib: "#" and "?" are ordinary characters of a key.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket or not key:
        raise ValueError(f"{uri!r} is no s3://bucket/key address.")
    return bucket, key
