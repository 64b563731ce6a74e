"""Small pictures that many look at, kept in memory: a page of a hundred of them fetches none whole."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from producer.gallery.rows import thumbnail

#: Thumbnails that are kept: of about 10 kB each.
MAX_KEPT: Final = 1_000


class Thumbnails:
    """The thumbnails of one server process, by the job's id. Thread-safe.

    Whether the job is known, and to whom, is for the caller to ask before.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, job_id: str, picture: Callable[[], bytes]) -> bytes:
        """The thumbnail as WebP, of the file that `picture` returns. Raises its errors, and `OSError`."""
        with self._lock:
            if (found := self._kept.get(job_id)) is not None:
                self._kept.move_to_end(job_id)
                return found
        made = thumbnail(picture())
        with self._lock:
            self._kept[job_id] = made
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return made
