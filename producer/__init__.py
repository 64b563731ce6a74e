"""Submit jobs and get their pictures: `client` and `ingest` are behind it, `cli` is the command.

    >>> from producer import submit_job
    >>> submit_job("a small cat").result().url()
    >>> submit_file("prompts.txt", images=4)

Importing this takes well under half a second: torch and diffusers are never loaded here, Celery, redis-py
and boto3 when first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from producer.client import JobHandle, JobResult, Progress, submit_job

if TYPE_CHECKING:
    from producer.ingest.submit_file import submit_file
    from worker.contract.infotext import job_from_image

__all__ = ["JobHandle", "JobResult", "Progress", "job_from_image", "submit_file", "submit_job"]


def __getattr__(name: str) -> object:
    """What takes a while to import, when it is first used."""
    if name == "submit_file":
        from producer.ingest.submit_file import submit_file

        return submit_file
    if name == "job_from_image":
        from worker.contract.infotext import job_from_image

        return job_from_image
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
