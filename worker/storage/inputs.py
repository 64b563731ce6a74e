"""The files that jobs begin with, in the bucket: put once, by their content, and renewed.

    PREFIX/inputs/<sha256>    see `worker.contract.object_keys`

Nothing here deletes. A lifecycle rule of the bucket may, by the time since the last put
(`deploy/s3-lifecycle.json`), and `smallcat forget` does. A file that is named by a new job is put again where
that is `RENEW_S` ago, so each stays for the rule's time less `RENEW_S` after the last job that names it.
"""

from __future__ import annotations

import base64
import datetime
import email.utils
import hashlib
from typing import TYPE_CHECKING, Final

import botocore.exceptions

from worker.contract.object_keys import input_key

if TYPE_CHECKING:
    from worker.storage.bucket import Bucket

#: Seconds since a file was put, after which it is put again when a new job names it.
RENEW_S: Final = 86_400.0


class Inputs:
    """The files that jobs begin with in one bucket. Thread-safe. Raises `StorageError`."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._options = bucket._options.for_inputs()

    def put(self, data: bytes, mime: str, tenant: str = "") -> str:
        """Store a file, unless it is there and was put lately. Returns the SHA-256 of its bytes.

        One request where it is there, two where it is not.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        found = self._age_and_size(sha256, tenant)
        # One of another size was written by somebody else, or is half of it.
        if found is None or found[0] > RENEW_S or found[1] != len(data):
            md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
            with self._bucket._errors():
                self._bucket._client.put_object(
                    Bucket=self._bucket.name,
                    Key=self._key(sha256, tenant),
                    Body=data,
                    ContentType=mime,
                    ContentMD5=md5,
                    **self._options.put_parameters(datetime.datetime.now(datetime.UTC)),
                )
        return sha256

    def renew(self, sha256: str, tenant: str = "") -> bool:
        """Renew a file that a job names again. False: it is not there."""
        found = self._age_and_size(sha256, tenant)
        if found is None:
            return False
        if found[0] > RENEW_S:
            key = self._key(sha256, tenant)
            with self._bucket._errors():
                # A copy onto itself must change something: S3 takes that of metadata.
                self._bucket._client.copy_object(
                    Bucket=self._bucket.name,
                    Key=key,
                    CopySource={"Bucket": self._bucket.name, "Key": key},
                    ContentType=found[2],
                    MetadataDirective="REPLACE",
                    Metadata={"renewed": datetime.datetime.now(datetime.UTC).date().isoformat()},
                    **self._options.put_parameters(datetime.datetime.now(datetime.UTC)),
                )
        return True

    def _key(self, sha256: str, tenant: str) -> str:
        return f"{self._bucket._prefix}{input_key(sha256, tenant)}"

    def _age_and_size(self, sha256: str, tenant: str) -> tuple[float, int, str] | None:
        """Seconds since a file was put, by the server's clock, its bytes, its type; None: none is there."""
        with self._bucket._errors():
            try:
                head = self._bucket._client.head_object(
                    Bucket=self._bucket.name, Key=self._key(sha256, tenant)
                )
            except botocore.exceptions.ClientError as error:
                if self._bucket._says_missing(error):
                    return None
                raise
        said = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = email.utils.parsedate_to_datetime(said) if said else datetime.datetime.now(datetime.UTC)
        return (now - head["LastModified"]).total_seconds(), head["ContentLength"], head["ContentType"]
