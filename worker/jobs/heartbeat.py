"""What a worker says and hears beside its jobs: progress, cancellations, and that it lives."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping

from worker.state.fleet import ANNOUNCE_EVERY_S, Fleet, WorkerInfo
from worker.state.keys import WORKERS_CHANNEL
from worker.state.records import Records

logger = logging.getLogger("smallcat.heartbeat")

#: Seconds between two writes of the jobs' progress, at least, while somebody looks at it. While nobody does,
#: it is written with the claims, at every quarter of the lease.
BEAT_S = 0.5
#: Seconds that one look at a job's progress counts as looking.
WATCH_S = 5.0
#: Seconds within which `stop` is noticed.
STOP_WITHIN_S = 0.5


class Heartbeat:
    """A thread that extends the jobs' claims and writes their progress, for all in one round trip, and
    passes cancellations on at once.

    `jobs` returns (step, steps) by id of all jobs this process holds. `cancel` is called with the id of
    each that was cancelled. `watchdog` is called about twice a second. Redis being away is logged once and
    tried again at every beat.
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
        watchdog: Callable[[], None],
    ) -> None:
        self._records = records
        self._fleet = fleet
        self._info = info
        self._lease_s = lease_s
        self._jobs = jobs
        self._cancel = cancel
        self._watchdog = watchdog
        self._leaving = threading.Event()
        self._withdrawn = False
        self._stop = threading.Event()
        self._watched_until_s = self._beaten_s = self._beat_due_s = self._announce_due_s = 0.0
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Announce the worker, and go on from a thread. Redis being away delays the announcement only."""
        try:
            self._fleet.announce(self._info)
            self._announce_due_s = time.monotonic() + ANNOUNCE_EVERY_S
        except Exception as error:  # noqa: BLE001 - the thread tries again
            logger.warning("The worker is not announced yet: %s", error)
        self._thread.start()

    def leave(self) -> None:
        """Withdraw the announcement, and go on beating for the jobs on board. Returns at once."""
        self._leaving.set()

    def stop(self) -> None:
        """Withdraw the announcement and end, within 5 seconds."""
        self._leaving.set()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        away = False
        while not self._stop.is_set():
            try:
                with self._records.listen(WORKERS_CHANNEL) as news:
                    while not self._stop.is_set():
                        self._watchdog()
                        self._say_what_is_due()
                        away = False
                        self._hear(news)
            except Exception as error:  # noqa: BLE001 - it must go on beating
                if not away:
                    logger.warning("Progress and announcements wait for Redis: %s", error)
                away = True
                self._watchdog()
                self._stop.wait(BEAT_S)
        try:
            self._withdraw()
        except Exception as error:  # noqa: BLE001 - the announcement expires by itself
            logger.warning("The worker's announcement could not be withdrawn: %s", error)

    def _withdraw(self) -> None:
        if not self._withdrawn:
            self._fleet.withdraw(self._info.name)
            self._withdrawn = True

    def _say_what_is_due(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._beat_due_s:
            for job_id in self._records.progress(self._jobs(), self._lease_s):
                self._cancel(job_id)
            self._beat_due_s = now_s + (BEAT_S if now_s < self._watched_until_s else self._lease_s / 4)
            self._beaten_s = now_s
        if self._leaving.is_set():
            self._withdraw()
            self._announce_due_s = math.inf
        elif now_s >= self._announce_due_s:
            # Due again in any case: cancellations are heard meanwhile, though Redis may be too full for this.
            self._announce_due_s = now_s + ANNOUNCE_EVERY_S
            self._fleet.announce(self._info)

    def _hear(self, news: Callable[[float], str | None]) -> None:
        """Wait for one message, but no longer than until something is to be said."""
        due_s = min(self._beat_due_s, self._announce_due_s)
        message = news(min(STOP_WITHIN_S, max(0.001, due_s - time.monotonic())))
        if message is None:
            return
        word, _, job_id = message.partition(" ")
        if word == "cancel" and (steps := self._jobs().get(job_id)) is not None:
            # Its record has the last word: it may have been submitted again since.
            for cancelled in self._records.progress({job_id: steps}, self._lease_s):
                self._cancel(cancelled)
        elif word == "watch":
            self._watched_until_s = time.monotonic() + WATCH_S
            self._beat_due_s = self._beaten_s + BEAT_S
