"""The indexes of the files that workers offer, in Redis: once for all workers that have the same files.

An index lies under its own digest, so its files never change, and who has read it need not read it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.contract.file_index import NO_FILES, FileIndex
from worker.state.keys import index_key

if TYPE_CHECKING:
    from redis.client import Redis

#: Indexes that a process keeps, at most.
MAX_KEPT = 32


def index_in(text: object, digest: str) -> FileIndex:
    """The index in the text of its key; `NO_FILES` where there is none, or one of another digest."""
    try:
        found = FileIndex.model_validate_json(text) if isinstance(text, str | bytes) else NO_FILES
    except ValueError:
        return NO_FILES
    # Whoever can write to Redis could have put another one there.
    return found if found.digest == digest else NO_FILES


class FileIndexes:
    """The indexes in one Redis. Thread-safe."""

    def __init__(self, client: Redis, ttl_s: int) -> None:
        self._redis, self._ttl_s = client, ttl_s
        self._kept: dict[str, FileIndex] = {}

    def put(self, index: FileIndex) -> None:
        """Keep `index` in Redis for as long as somebody announces it, and `ttl_s` seconds after that."""
        if not index.digest:
            return
        key, text = index_key(index.digest), index.text
        self._redis.expire(key, self._ttl_s)
        # Of one digest the longer text says more: a worker of an earlier version leaves out what it does not
        # know, such as AutoV3.
        if self._redis.strlen(key) < len(text.encode()):
            self._redis.set(key, text, ex=self._ttl_s)

    def get(self, digest: str) -> FileIndex:
        """The index of that digest; one without files where Redis has it no longer, or it is another one."""
        if not digest:
            return NO_FILES
        if (known := self._kept.get(digest)) is not None:
            return known
        found = index_in(self._redis.get(index_key(digest)), digest)
        if found is NO_FILES:
            return found
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[digest] = found
        return found
