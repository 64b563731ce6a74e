"""What workers know of the files in buckets, in Redis: one of them reads a file, and all know its hash.

A file is known by its stamp, which is another one when the file is. Producers cannot write here. Where Redis
does not answer, a worker goes on as if nobody else knew anything: it reads the files itself.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from worker.contract.file_index import MAX_FILES, FileEntry
from worker.contract.plain_text import plain
from worker.state.keys import KNOWN_FILES, READ_FILE
from worker.state.redis_client import RedisError

if TYPE_CHECKING:
    from redis.client import Redis

logger = logging.getLogger("smallcat.files")

#: Seconds until a worker that reads a file, and says so no longer, counts as dead.
CLAIM_S = 20
#: Files of which something is kept, at most. Beyond that all is forgotten, and those that are there are kept
#: again.
MAX_KNOWN = 4 * MAX_FILES

T = TypeVar("T")
U = TypeVar("U")


class KnownFiles:
    """What is known in one Redis. Thread-safe."""

    def __init__(self, client: Redis, ttl_s: int) -> None:
        """`ttl_s`: seconds that all of it is kept after the last look of a worker."""
        self._redis, self._ttl_s = client, ttl_s
        self._is_away = False

    def get(self, stamps: Sequence[str]) -> dict[str, FileEntry]:
        """What is known of the files with these stamps."""
        found: dict[str, FileEntry] = {}
        texts = self._asked(lambda: self._redis.hmget(KNOWN_FILES, list(stamps)), None) if stamps else None
        for stamp, text in zip(stamps, texts or (), strict=False):
            try:
                if text is not None:
                    found[stamp] = FileEntry.model_validate_json(text)
            except ValidationError:
                logger.warning("What Redis has of a file cannot be read: the file is read again.")
        return found

    def put(self, known: Mapping[str, FileEntry]) -> None:
        """Let all workers know of these files, by their stamps."""

        def put() -> None:
            if self._redis.hlen(KNOWN_FILES) + len(known) > MAX_KNOWN:
                self._redis.delete(KNOWN_FILES)
            self._redis.hset(
                KNOWN_FILES, mapping={stamp: each.model_dump_json() for stamp, each in known.items()}
            )
            self._redis.expire(KNOWN_FILES, self._ttl_s)

        if known:
            self._asked(put, None)

    def keep(self) -> bool:
        """Keep it all for longer. False: there is nothing."""
        return bool(self._asked(lambda: self._redis.expire(KNOWN_FILES, self._ttl_s), True))

    def forget(self, stamp: str) -> None:
        """Let no worker know of a file any more: what was known is wrong."""
        self._asked(lambda: self._redis.hdel(KNOWN_FILES, stamp), 0)

    def claim(self, stamp: str) -> bool:
        """Whether this worker may read a file. False: another one reads it."""
        return bool(self._asked(lambda: self._redis.set(_claim(stamp), 1, nx=True, ex=CLAIM_S), True))

    def go_on(self, stamp: str) -> None:
        """This worker still reads the file: to be said every few seconds."""
        self._asked(lambda: self._redis.set(_claim(stamp), 1, ex=CLAIM_S), True)

    def release(self, stamp: str) -> None:
        """This worker reads the file no longer."""
        self._asked(lambda: self._redis.delete(_claim(stamp)), 0)

    def _asked(self, ask: Callable[[], T], otherwise: U) -> T | U:
        try:
            answer = ask()
        except RedisError as error:
            if not self._is_away:
                logger.warning("Workers cannot share what they know of files: %s", plain(error))
            self._is_away = True
            return otherwise
        self._is_away = False
        return answer


def _claim(stamp: str) -> str:
    return f"{READ_FILE}{hashlib.sha256(stamp.encode()).hexdigest()[:32]}"
