"""What a worker says and hears beside its jobs: progress, cancellations, and that it lives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from worker.fleet import ANNOUNCE_EVERY_S, Fleet, WorkerInfo
from worker.records import CANCEL_CHANNEL, Records

logger = logging.getLogger("smallcat.heartbeat")

#: Seconds between two looks at the jobs: progress is written at most this often.
BEAT_S = 0.5


class Heartbeat:
    """A thread that writes all jobs' progress in one round trip, extends their claims, and passes
    cancellations on within a step.

    `jobs` returns (step, steps) by id of all jobs this process holds. `cancel` is called with the id of
    each that was cancelled. Redis being away is logged once and tried again at every beat.
    """

    def __init__(
        self,
        records: Records,
        fleet: Fleet,
        info: WorkerInfo,
        *,
        lease_s: float,
        jobs: Callable[[], Mapping[str, tuple[int, int]]],
        cancel: Callable[[str], None],
    ) -> None:
        self._records = records
        self._fleet = fleet
        self._info = info
        self._lease_s = lease_s
        self._jobs = jobs
        self._cancel = cancel
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Announce the worker, and go on from a thread."""
        self._fleet.announce(self._info)
        self._thread.start()

    def stop(self) -> None:
        """Withdraw the announcement and end."""
        self._stop.set()
        self._thread.join(timeout=5)
        try:
            self._fleet.withdraw(self._info.name)
        except Exception as error:  # noqa: BLE001 - the announcement expires by itself
            logger.warning("The worker's announcement could not be withdrawn: %s", error)

    def _run(self) -> None:
        announced_s = time.monotonic()
        away = False
        while not self._stop.is_set():
            try:
                with self._records.listen(CANCEL_CHANNEL) as news:
                    while not self._stop.is_set():
                        self._beat()
                        if time.monotonic() - announced_s >= ANNOUNCE_EVERY_S:
                            self._fleet.announce(self._info)
                            announced_s = time.monotonic()
                        away = False
                        until = time.monotonic() + BEAT_S
                        while (left := until - time.monotonic()) > 0:
                            if job_id := news(left):
                                self._cancel(job_id)
            except Exception as error:  # noqa: BLE001 - it must go on beating
                if not away:
                    logger.warning("Progress and announcements wait for Redis: %s", error)
                away = True
                self._stop.wait(BEAT_S)

    def _beat(self) -> None:
        for job_id in self._records.progress(self._jobs(), self._lease_s):
            self._cancel(job_id)
