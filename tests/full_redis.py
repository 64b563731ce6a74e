"""A Redis that takes nothing new for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis


@contextmanager
def full(client: redis.Redis) -> Iterator[None]:
    """Its memory is full: it refuses all that may take memory."""
    client.config_set("maxmemory", 1)
    try:
        yield
    finally:
        client.config_set("maxmemory", 0)
