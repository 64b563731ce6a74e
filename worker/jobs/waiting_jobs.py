"""Looks through the jobs that wait for the pictures of others, from time to time (`worker.state.chains`)."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from worker.contract.errors import StorageError
from worker.contract.plain_text import plain
from worker.contract.refusals import refusal_log
from worker.state.chains import Chains

logger = logging.getLogger("smallcat.jobs")

#: Seconds between two looks, about: of each worker.
EVERY_S = 5.0


class WaitingJobs:
    """A thread that settles jobs whose parents have ended otherwise than by the scripts of this version.

    `is_stored` says whether the bucket has a job's picture, by its id and tenant. A Redis that is out of
    reach is logged once; a bucket each time. The next look tries again.
    """

    def __init__(self, chains: Chains, is_stored: Callable[[str, str], bool]) -> None:
        self._chains, self._is_stored = chains, is_stored
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waiting jobs", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. Returns at once."""
        self._stop.set()

    def _run(self) -> None:
        # The workers of a fleet do not look at the same moment.
        while not self._stop.wait(EVERY_S * random.uniform(0.5, 1.5)):  # noqa: S311 - nothing secret
            try:
                self._chains.look(self._is_stored)
                refusal_log.answered("jobs that wait for others")
            except StorageError as error:
                logger.warning("Whether jobs may go on that wait for others cannot be told: %s", plain(error))
            except Exception as error:  # noqa: BLE001 - the thread must not end
                refusal_log.refused("jobs that wait for others", error)
