"""The names of the queues, and of the Redis lists that hold them."""

from __future__ import annotations

import hashlib
import re

from worker.contract.job import DEFAULT_MODEL, MAX_PRIORITY, Job, ServedModel


def queue_of(job: Job) -> str:
    """The Celery queue of a resolved or an open job."""
    return _queue(job.model, None if job.is_open else job.revision)


def queues_of(served: ServedModel) -> list[str]:
    """The queues of a worker: its model's at its revision, and those of open jobs that mean it."""
    return [_queue(served.name, served.revision), _queue(served.name, None), _queue(DEFAULT_MODEL, None)]


def lists_of(queue: str) -> list[str]:
    """The Redis lists that hold `queue`, one a priority (named as in kombu/transport/redis.py)."""
    return [queue, *(f"{queue}\x06\x16{priority}" for priority in range(1, MAX_PRIORITY + 1))]


def _queue(model: str, revision: str | None) -> str:
    name = f"smallcat.{_slug(model, 60)}"
    if revision is None:
        return name
    # A commit or a hash is told by its first 16 digits.
    is_hash = re.fullmatch(r"[0-9a-f]{16,}", revision)
    return f"{name}@{revision[:16] if is_hash else _slug(revision, 16)}"


def _slug(name: str, length: int) -> str:
    """`name` where it is short and plain, else what is left of it with a hash of all of it."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    if slug == name and len(slug) <= length:
        return slug
    # Two names may share a slug: what the slug loses, the hash keeps.
    return f"{slug[:length]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
