"""Submit jobs and get their pictures.

    >>> from producer import submit_job
    >>> submit_job("a small cat").result().url()
    >>> submit_file("prompts.txt", images=4)

Importing this takes well under half a second: torch and diffusers are never loaded here, Celery, redis-py
and boto3 when first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from producer.client import JobHandle, JobResult, Progress, job_from_image, submit_job

if TYPE_CHECKING:
    from producer.files import submit_file

__all__ = ["JobHandle", "JobResult", "Progress", "job_from_image", "submit_file", "submit_job"]


def __getattr__(name: str) -> object:
    """`submit_file` when it is first used: what it needs takes a while to import."""
    if name == "submit_file":
        from producer.files import submit_file

        return submit_file
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
