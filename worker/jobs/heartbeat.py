"""The worker's heartbeat: announcements, claims and progress go to Redis, cancellations come back."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping

from worker.contract.file_index import NO_FILES, FileIndex
from worker.contract.refusals import refusal_log
from worker.state.fleet import ANNOUNCE_EVERY_S, Fleet, WorkerInfo
from worker.state.keys import WORKERS_CHANNEL
from worker.state.records import Records
from worker.state.redis_client import RedisError

logger = logging.getLogger("smallcat.heartbeat")

#: Seconds between two writes of the jobs' progress, at least, while somebody follows it. While nobody does,
#: progress is written when the claims are extended, at every quarter of the lease.
BEAT_S = 0.5
#: Seconds for which somebody who asked for a job's progress counts as following it.
WATCH_S = 5.0
#: Seconds within which `stop` is noticed.
STOP_WITHIN_S = 0.5


class Heartbeat:
    """A thread that extends the jobs' claims and writes their progress, all in one round trip, and passes
    cancellations on at once.

    `jobs` returns (steps done, steps in all) by id of all jobs in flight. `cancel` is called with the id of
    each job that was cancelled, `preview` with that of each that somebody looks at. `watchdog` is called
    about twice a second. `paused` returns why the worker takes no jobs at present, or nothing, and `files`
    what it offers; a change is announced at once. `lately` returns pictures a second and rows of a step,
    announced with the number of jobs and `max_rows` (None: as in `info`). That Redis is out of reach is
    logged once; each beat tries again.
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
        paused: Callable[[], str] = lambda: "",
        files: Callable[[], FileIndex] = lambda: NO_FILES,
        lately: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
        max_rows: Callable[[], int] | None = None,
        preview: Callable[[str], None] = lambda job_id: None,
    ) -> None:
        self._records = records
        self._fleet = fleet
        self._info = info
        self._lease_s = lease_s
        self._jobs = jobs
        self._cancel = cancel
        self._watchdog = watchdog
        self._paused, self._files = paused, files
        self._lately, self._preview = lately, preview
        self._max_rows = max_rows or (lambda: info.max_rows)
        self._withdrawing = threading.Event()
        self._withdrawn = False
        self._stop = threading.Event()
        self._watched_until_s = self._beaten_s = self._beat_due_s = self._announce_due_s = 0.0
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Announce the worker, and go on in a thread. A Redis out of reach only delays the announcement."""
        try:
            self._tell()
            self._announce_due_s = time.monotonic() + ANNOUNCE_EVERY_S
        except Exception as error:  # noqa: BLE001 - the thread tries again
            refusal_log.refused("announcement", error)
        self._thread.start()

    def leave(self) -> None:
        """Withdraw the announcement; claims of jobs in flight are still extended. Returns at once."""
        self._withdrawing.set()

    def stop(self) -> None:
        """Withdraw the announcement and end, within 5 seconds."""
        self._withdrawing.set()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._records.listen(WORKERS_CHANNEL) as receive:
                    while not self._stop.is_set():
                        self._watchdog()
                        self._send_what_is_due()
                        self._receive(receive)
            except Exception as error:  # noqa: BLE001 - the thread must not end
                refusal_log.refused("heartbeat", error)
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

    def _send_what_is_due(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._beat_due_s:
            for job_id in self._records.progress(self._jobs(), self._lease_s):
                self._cancel(job_id)
            self._beat_due_s = now_s + (BEAT_S if now_s < self._watched_until_s else self._lease_s / 4)
            self._beaten_s = now_s
            refusal_log.answered("heartbeat")
        now = {"paused": self._paused(), "files": self._files().digest}
        if now != {name: getattr(self._info, name) for name in now}:
            self._info = self._info.model_copy(update=now)
            self._announce_due_s = now_s
        if self._withdrawing.is_set():
            self._withdraw()
            self._announce_due_s = math.inf
        elif now_s >= self._announce_due_s:
            # Set before: a Redis that is too full for it must not keep cancellations from being received.
            self._announce_due_s = now_s + ANNOUNCE_EVERY_S
            self._announce()

    def _tell(self) -> None:
        """Announce the worker, with what it offers."""
        index = self._files()
        self._fleet.indexes.put(index)
        self._info = self._info.model_copy(update={"files": index.digest})
        images_s, step_rows = self._lately()
        now = {"running": len(self._jobs()), "images_s": images_s, "step_rows": step_rows}
        rows = {"max_rows": self._max_rows()}
        self._fleet.announce(self._info.model_copy(update=now | rows))

    def _announce(self) -> None:
        try:
            self._tell()
        except RedisError as error:
            # What is wrong with the connection is noticed by the next beat.
            refusal_log.refused("announcement", error)
            self._announce_due_s = time.monotonic() + BEAT_S
        else:
            refusal_log.answered("announcement")

    def _receive(self, receive: Callable[[float], str | None]) -> None:
        """Wait for one message, but no longer than until something is due to be sent."""
        due_s = min(self._beat_due_s, self._announce_due_s)
        message = receive(min(STOP_WITHIN_S, max(0.001, due_s - time.monotonic())))
        if message is None:
            return
        command, _, job_id = message.partition(" ")
        if command == "cancel" and (steps := self._jobs().get(job_id)) is not None:
            # The record decides: the job may have been submitted again since.
            for cancelled in self._records.progress({job_id: steps}, self._lease_s):
                self._cancel(cancelled)
        elif command == "preview":
            self._preview(job_id)
        elif command == "watch":
            self._watched_until_s = time.monotonic() + WATCH_S
            self._beat_due_s = self._beaten_s + BEAT_S
