"""Submit jobs and get their pictures.

    >>> from producer import submit_job
    >>> submit_job("a small cat").result().url()

Importing this takes well under half a second: torch and diffusers are never loaded here, Celery, redis-py
and boto3 when first needed.
"""

from __future__ import annotations

from producer.client import JobHandle, JobResult, Progress, job_from_image, submit_job

__all__ = ["JobHandle", "JobResult", "Progress", "job_from_image", "submit_job"]
