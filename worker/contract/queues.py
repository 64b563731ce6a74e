"""The names of the queues, and of the Redis lists that hold them.

A queue is a model at a revision. kombu keeps a list for each of its priorities: that of the most urgent one
has the queue's own name, the others have the separator and their number behind it.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from worker.contract.job import Job
from worker.contract.job_parameters import DEFAULT_MODEL, DEFAULT_PRIORITY, MAX_PRIORITY
from worker.contract.served_model import ServedModel

#: kombu's separator, of a queue and its priority. No queue's name contains it.
SEPARATOR = "\x06\x16"
#: What follows a queue's name in those of its lists where it is said that tenants wait.
ARRIVALS = f"{SEPARATOR}arrivals{SEPARATOR}"
#: Redis' priority (see `worker.contract.message.Route`) of a job of `DEFAULT_PRIORITY`, which is what
#: `submit_job` sends unless the caller says otherwise. Jobs of prompt files have a larger number: they come
#: later. Those up to it are urgent; `shares.lua` and `put.lua` have the same number.
URGENT = MAX_PRIORITY - DEFAULT_PRIORITY
#: Begins the keys of what tenants have had of a queue, which the queue's name follows; and their weights.
SHARES, WEIGHTS = "smallcat:shares:", "smallcat:weights"
#: The list of messages that no worker can read, the latest first. Each entry is what is known of it as JSON,
#: a line's end, and the message as it was found, perhaps cut.
UNDECODABLE = "smallcat:undecodable"
#: The set of the lists where messages of newer versions wait for a worker that reads them.
PARKED = "smallcat:parked"


class Takers(NamedTuple):
    """Who takes messages of one version from one queue."""

    #: Live workers that do.
    workers: int
    #: Live workers that would, and take no jobs at present.
    paused: int
    #: The version of messages up to which live workers of the queue read; 0: there are none.
    reads: int
    #: Live workers that would, and lack a file that the job uses.
    lacking: int = 0


def queue_of(job: Job) -> str:
    """The Celery queue of a resolved or an open job."""
    return _queue(job.model, None if job.is_open else job.revision)


def queues_of(served: ServedModel) -> list[str]:
    """The queues of a worker: its model's at its revision, and those of open jobs that mean it."""
    return [_queue(served.name, served.revision), _queue(served.name, None), _queue(DEFAULT_MODEL, None)]


def list_of(queue: str, priority: int, tenant: str = "") -> str:
    """The Redis list of `queue` for messages of this priority, as Redis counts: 0 is fetched first.

    Each tenant has lists of its own.
    """
    if tenant:
        return f"{queue}{SEPARATOR}{priority}{SEPARATOR}t={tenant}"
    return f"{queue}{SEPARATOR}{priority}" if priority else queue


def arrivals_of(queue: str, priority: int) -> str:
    """The Redis list where it is said that a tenant has a message of this priority: see `shares.lua`."""
    return f"{queue}{ARRIVALS}{int(priority > URGENT)}"


def tenant_of_list(name: str) -> tuple[str, int, str]:
    """The queue of the Redis list `name`, its priority as Redis counts, and whose it is; empty: nobody's."""
    found = re.fullmatch(f"(.+){SEPARATOR}([0-9]){SEPARATOR}t=([a-z0-9-]+)", name, re.DOTALL)
    return (found[1], int(found[2]), found[3]) if found else (queue_of_list(name), 0, "")


def lists_of(queue: str, version: int = 1) -> list[str]:
    """The Redis lists that hold `queue` for workers that read messages up to `version`, most urgent first."""
    return [name for priority in range(MAX_PRIORITY + 1) for name in lists_at(queue, priority, version)]


def lists_at(queue: str, priority: int, version: int) -> list[str]:
    """The Redis lists of `queue` at one priority; first those that older workers put aside."""
    aside = [parked_list_of(queue, priority, each) for each in range(2, version + 1)]
    return [*aside, list_of(queue, priority)]


def parked_list_of(queue: str, priority: int, version: int) -> str:
    """The Redis list of messages of `version`, for workers that read it; older ones put them there."""
    return f"{queue}{SEPARATOR}{priority}{SEPARATOR}v{version}"


def list_of_parked(name: str) -> str:
    """The Redis list where the messages of the parked list `name` were found."""
    return name.rpartition(SEPARATOR)[0].removesuffix(f"{SEPARATOR}0")


def version_of_parked(name: str) -> int:
    """The version of the messages in the parked list `name`; 0 where it is none."""
    found = re.fullmatch(f".+{SEPARATOR}[0-9]{SEPARATOR}v([0-9]{{1,3}})", name, re.DOTALL)
    return int(found[1]) if found else 0


def queue_of_list(name: str) -> str:
    """The queue that the Redis list `name` belongs to."""
    return name.partition(SEPARATOR)[0]


def _queue(model: str, revision: str | None) -> str:
    name = f"smallcat.{_slug(model, 60)}"
    if revision is None:
        return name
    # A commit or a hash is known by its first 16 digits.
    is_hash = re.fullmatch(r"[0-9a-f]{16,}", revision)
    return f"{name}@{revision[:16] if is_hash else _slug(revision, 16)}"


def _slug(name: str, length: int) -> str:
    """`name` where it is short and plain, else what is left of it with a hash of all of it."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    if slug == name and len(slug) <= length:
        return slug
    # Two names may have the same slug: the hash tells them apart.
    return f"{slug[:length]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
