"""Whether the bucket takes this worker's objects: a refusal of one object is not one of all.

    open ──an object is refused, and a test object, too──► closed ──a test object is taken──► open

Rights lapse while a worker runs: keys expire, a policy changes, the storage fills up, a bucket is removed.
While access is closed, jobs go back to the queue, where workers that have the rights take them, and this
worker takes no others: what it would render could not be stored.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from worker.contract.errors import BucketRefusedError, PermanentStorageError, StorageError
from worker.jobs import metrics
from worker.jobs.retry_policy import Backoff

logger = logging.getLogger("smallcat.jobs")

#: Between two test objects while access is closed.
REOPEN_BACKOFF: Final = Backoff(1.0, 5.0)
#: Bytes of a test object, at least.
MIN_SIZE: Final = 8


class BucketAccess:
    """Decides whose fault a refusal is, and knows when the worker has to wait. Thread-safe.

    `probe`: puts, reads and removes a test object of so many bytes; raises `StorageError`.
    """

    def __init__(self, probe: Callable[[int], object]) -> None:
        self._probe = probe
        #: Held while a test object is on its way, so that there is one at a time.
        self._lock = threading.Lock()
        self._reason = ""
        #: When the last test object that was taken was begun, and its bytes.
        self._taken_s, self._taken_size = 0.0, 0
        self._ended = threading.Event()

    @property
    def reason(self) -> str:
        """Why access is closed; empty while it is open."""
        return self._reason

    def require(self) -> None:
        """Raise `BucketRefusedError` while access is closed."""
        if self._reason:
            raise BucketRefusedError("The bucket refuses this worker: the job goes back to the queue.")

    def judge(self, size: int) -> None:
        """Return where an object of `size` bytes was refused although a test object as large is taken.

        Raises `BucketRefusedError` where that is refused as well, and closes access until it is taken.
        Raises `StorageError` where the storage fails, so that nobody can tell.
        """
        size = max(size, MIN_SIZE)
        refused_s = time.monotonic()
        with self._lock:
            self.require()
            if self._taken_s > refused_s and self._taken_size >= size:
                return  # Another thread has tried since.
            try:
                self._try(size)
            except PermanentStorageError as error:
                self._close(error, size)
        self.require()

    def end(self) -> None:
        """Try no more test objects: the worker stops."""
        self._ended.set()

    def _try(self, size: int) -> None:
        begun_s = time.monotonic()
        self._probe(size)
        self._taken_s, self._taken_size = begun_s, size

    def _close(self, error: PermanentStorageError, size: int) -> None:
        self._reason = str(error)
        metrics.PAUSED.set(1)
        logger.error(
            "Jobs go back to the queue, and no others are taken, until the bucket lets them in. %s", error
        )
        threading.Thread(target=self._reopen, args=[size], name="bucket access", daemon=True).start()

    def _reopen(self, size: int) -> None:
        tries = 0
        while True:
            tries += 1
            chance = random.random()  # noqa: S311 - nothing secret
            if self._ended.wait(REOPEN_BACKOFF.jittered_s(tries, chance)):
                return
            try:
                self._try(size)
            except StorageError:
                continue
            except Exception:
                logger.exception("The bucket cannot be tried; it is tried again")
                continue
            metrics.PAUSED.set(0)
            self._reason = ""
            logger.warning("The bucket takes objects again, and so this worker jobs.")
            return
