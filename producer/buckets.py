"""The buckets that this process reads, each with one client for all who ask. boto3 loads with the first."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.storage import Storage

#: Tries of a request: who asks waits, a few seconds and not the minute that a worker has.
ATTEMPTS = 4


def bucket(name: str, prefix: str = "") -> Storage:
    """The bucket in the environment as it is now: when boto3's variables change, it is another one."""
    ours = tuple(sorted(each for each in os.environ.items() if each[0].startswith("AWS_")))
    return _made(name, prefix, ours)


@functools.lru_cache(maxsize=16)
def _made(name: str, prefix: str, environment: tuple[tuple[str, str], ...]) -> Storage:
    from worker.storage import Storage

    return Storage(name, prefix, attempts=ATTEMPTS)
