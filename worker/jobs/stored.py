"""Whether the bucket has what a record says, or denies: producers can write records."""

from __future__ import annotations

from worker.contract.errors import StorageError
from worker.contract.message import Message
from worker.storage.bucket import Bucket


def is_stored(bucket: Bucket, message: Message) -> bool:
    """Whether the bucket has the picture of a job whose record says so; True where nobody can tell."""
    try:
        return bucket.find(message.id, message.job.format, message.job.tenant) is not None
    except StorageError:
        return True


def has_picture(bucket: Bucket, job_id: str, tenant: str) -> bool:
    """Whether the bucket has the picture of a job; False where nobody can tell."""
    try:
        return bucket.has_record(job_id, tenant)
    except StorageError:
        return False
