"""Deleting pictures and records for good: all versions of them, where the bucket has versions.

Workers delete nothing. This is for `smallcat forget`, with keys that have `deploy/s3-forget-policy.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import botocore.exceptions

from worker.contract.choices import ImageFormat
from worker.contract.object_keys import object_key
from worker.storage.inputs import RENEW_S
from worker.storage.refusals import code_of

if TYPE_CHECKING:
    from worker.storage.bucket import Bucket

#: Objects that are deleted in one request: S3's limit.
AT_ONCE: Final = 1_000
#: What the key of a job's object looks like, below the prefix.
_KEY: Final = re.compile(r"images/(?:tenants/([a-z0-9-]+)/)?[0-9a-f]{2}/([0-9a-f]{32})\.([a-z]+)")
#: What that of a file looks like that jobs begin with.
_INPUT: Final = re.compile(r"inputs/(?:tenants/([a-z0-9-]+)/)?[0-9a-f]{64}()")
#: What servers answer that do not have a request.
_NOT_THERE: Final = frozenset({"NotImplemented", "MethodNotAllowed", "501", "405", "UnsupportedOperation"})


class Stored(NamedTuple):
    """A version of an object of jobs; of a bucket without versions, the object."""

    key: str
    #: Its version; empty: the bucket has none.
    version: str
    #: Unix seconds when it was put.
    at: float
    #: The job's id, empty for an input, and the tenant.
    job_id: str
    tenant: str
    #: Whether it is the object as it is read now, and no older version or mark of a deletion.
    is_current: bool


class Deletion:
    """Lists and deletes the objects of jobs in one bucket. Raises `StorageError`."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._has_versions: bool | None = None

    def of_tenant(self, tenant: str) -> Iterator[Stored]:
        """All objects of a tenant's jobs."""
        return self._below(f"images/tenants/{tenant}/")

    def of_all(self) -> Iterator[Stored]:
        """All objects of jobs, those of tenants included."""
        return self._below("images/")

    def inputs_of_tenant(self, tenant: str) -> Iterator[Stored]:
        """All files that a tenant's jobs begin with."""
        return self._below(f"inputs/tenants/{tenant}/")

    def inputs_before(self, at: float) -> Iterator[Stored]:
        """All files that no job begins with which was submitted since `at`, in Unix seconds, or later.

        Those of tenants are included. A job renews what it begins with where it was put long ago.
        """
        return (each for each in self._below("inputs/") if each.at < at - RENEW_S)

    def of_job(self, job_id: str, tenants: Iterable[str]) -> Iterator[Stored]:
        """The objects of one job, which is of one of these tenants; "" stands for none."""
        for tenant in tenants:
            key = object_key(job_id, ImageFormat.PNG, tenant)
            yield from self._below(key.removesuffix(ImageFormat.PNG))

    def tenants(self) -> list[str]:
        """The tenants that have objects."""
        start = f"{self._bucket._prefix}images/tenants/"
        with self._bucket._errors():
            pages = self._bucket._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket.name, Prefix=start, Delimiter="/"
            )
            found = [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", ())]
        return [name.removeprefix(start).rstrip("/") for name in found]

    def delete(self, objects: Sequence[Stored]) -> list[str]:
        """Delete up to `AT_ONCE` of them. Returns a sentence for each that stays, such as a locked one."""
        with self._bucket._errors():
            try:
                return self._delete_together(objects)
            except botocore.exceptions.ClientError as error:
                if code_of(error) not in _NOT_THERE:
                    raise
            return [said for each in objects if (said := self._delete_one(each))]

    def _delete_together(self, objects: Sequence[Stored]) -> list[str]:
        names: list[Any] = [
            {"Key": each.key} | ({"VersionId": each.version} if each.version else {}) for each in objects
        ]
        answer = self._bucket._client.delete_objects(
            Bucket=self._bucket.name, Delete={"Objects": names, "Quiet": True}
        )
        return [
            f"{each.get('Key')}: {each.get('Code')} {each.get('Message', '')}"
            for each in answer.get("Errors", ())
            if each.get("Code") not in ("NoSuchKey", "NoSuchVersion")
        ]

    def _delete_one(self, each: Stored) -> str:
        which: dict[str, Any] = {"VersionId": each.version} if each.version else {}
        try:
            self._bucket._client.delete_object(Bucket=self._bucket.name, Key=each.key, **which)
        except botocore.exceptions.ClientError as error:
            if code_of(error) not in ("AccessDenied", "InvalidRequest"):
                raise
            return f"{each.key}: {code_of(error)}"
        return ""

    def _below(self, start: str) -> Iterator[Stored]:
        prefix = f"{self._bucket._prefix}{start}"
        with self._bucket._errors():
            if self._has_versions is None:
                self._has_versions = self._ask_for_versions()
            kind = "list_object_versions" if self._has_versions else "list_objects_v2"
            paginator = cast("Any", self._bucket._client).get_paginator(kind)
            for page in paginator.paginate(Bucket=self._bucket.name, Prefix=prefix):
                for name in ("Contents", "Versions", "DeleteMarkers"):
                    for found in page.get(name, ()):
                        if stored := self._stored(found, is_mark=name == "DeleteMarkers"):
                            yield stored

    def _ask_for_versions(self) -> bool:
        """Whether the bucket has versions of objects, or had."""
        try:
            answer = self._bucket._client.get_bucket_versioning(Bucket=self._bucket.name)
        except botocore.exceptions.ClientError as error:
            if code_of(error) not in _NOT_THERE:
                raise
            return False
        return "Status" in answer

    def _stored(self, found: Any, *, is_mark: bool) -> Stored | None:
        """What a listing says; None for what is no object of jobs."""
        name = found["Key"].removeprefix(self._bucket._prefix)
        match = _KEY.fullmatch(name) or _INPUT.fullmatch(name)
        if match is None:
            return None
        is_current = not is_mark and found.get("IsLatest", True)
        at, version = found["LastModified"].timestamp(), found.get("VersionId", "")
        return Stored(found["Key"], version, at, match[2], match[1] or "", is_current)


def batches(objects: Iterable[Stored]) -> Iterator[list[Stored]]:
    """The objects, as many at a time as one request deletes."""
    rest = iter(objects)
    while batch := list(islice(rest, AT_ONCE)):
        yield batch
