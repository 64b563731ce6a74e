"""Feeds a run of prompt files: a bounded number of messages ahead of the workers, resumable at any instant.

    files ─► plan ─► window of 500 ─► one step in Redis: the messages and the cursor
                                                │
    manifest ◄─ journal ◄─ outcome of each job ◄─ workers

Redis alone knows what is left to do: the cursor says what was sent, the workers' bits say what has ended. A
job that was sent, has not ended, and is neither queued nor held by a worker is sent again.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from producer.ingest import manifest_path
from producer.ingest.check import refuse_bad_lines
from producer.ingest.journal import Journal, journal_path
from producer.ingest.manifest import write_manifest
from producer.ingest.messages import Messages, tag_of_process
from producer.ingest.pinned import Pinned, has_new_limits, pin_limits
from producer.ingest.plan import Cursor, Plan, Planned, Rejected
from producer.ingest.rejects import OwnFiles, Rejects
from producer.ingest.results import Results
from producer.ingest.run_state import Run, Status
from producer.ingest.run_webhook import set_webhook
from producer.ingest.sent import Sent
from producer.ingest.types import Counts, Display, Gate, Options, Outcome
from producer.ingest.windows import Windows
from producer.ingest.writing import writing
from producer.session import Session
from worker.contract.errors import PromptFileError, QueueError
from worker.contract.plain_text import counted

if TYPE_CHECKING:
    from producer.ingest.download import Downloads

#: Jobs that are sent in one step.
WINDOW = 500
#: Seconds between two polls of the run when there is nothing to do.
POLL_EVERY_S = 0.1
#: Seconds with empty queues and without an outcome, until a check for lost messages.
QUIET_S = 3.0
#: The same where all that is not over waits for other jobs.
QUIET_WAITING_S = 60.0
#: The run's field that says which files of rejected lines are its own.
REJECTED_FILES = "rejected files"
#: The run's field of the version that names pictures of `--download`. Without it, it is the first one.
NAMES = "names"
#: Names of files that a run keeps for lists of runs.
SHOWN_FILES = 10
#: Times that lost jobs are sent again, at most, before the run fails.
MAX_SENT_AGAIN = 3


class Ingest:
    """Feeds a run when called, until all its jobs have ended or it is stopped."""

    def __init__(
        self,
        plan: Plan,
        options: Options,
        session: Session,
        display: Display,
        downloads: Downloads | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._plan, self._options, self._display = plan, options, display
        self._gate = gate or Gate()
        self._windows = Windows(self._gate, display.notice)
        self._session, self._downloads = session, downloads
        #: The manifest as it was asked for; the journal's name is made from it.
        self._wanted = options.manifest or plan.sources[0].beside("manifest.jsonl")
        #: Where it goes: see `manifest_path`.
        self._manifest = self._wanted
        self.run = self._run_of(plan.digest)
        self._pinned = Pinned(self.run, session.fleet, self._gate)
        self._results = Results(self.run, session, plan.tenant)
        self._stop = threading.Event()
        self._messages = Messages(session)
        #: The run's cursor, as this process has moved it; None: it has not, and reads it again.
        self._cursor: str | None = None
        self._rejected = 0
        self._rejects: Rejects | None = None
        self._received_at = self._counted_at = 0.0
        self._sent_again = 0
        self._told_of_parked = self._told_of_waiting = False
        self._counts = Counts()

    def stop(self) -> None:
        """Send no more: the call returns when what was sent has ended. Safe in a signal handler."""
        self._stop.set()

    def __call__(self) -> Outcome:
        """Feed the run. Raises `PromptFileError`, `QueueError`, `StorageError`; a later call resumes it."""
        with self._session.queue_errors():
            self._go_on_as_begun()
            pictures = self._plan.pictures
            if pictures:
                pictures.of(self.run)
            if self._options.strict:
                refuse_bad_lines(self._plan, self._display.notice, self._pinned.foreseer)
            self._choose_manifest()
            self.run.take()
            self.run.note("files", json.dumps([each.name for each in self._plan.sources[:SHOWN_FILES]]))
            if self._plan.tenant:
                self.run.note("tenant", self._plan.tenant)
            if self.run.noted("cancelled") is not None:
                # In this order: a journal without its run is no harm.
                journal_path(self._wanted, self.run.id).unlink(missing_ok=True)
                self.run.begin_anew(keep=("files", "tenant", REJECTED_FILES))
                if pictures:
                    pictures.of(self.run)
            if self.run.noted("cursor") is None:
                self.run.note(NAMES, "2")
                pin_limits(self.run)
            if self._downloads:
                self._downloads.as_first = self.run.noted(NAMES) is None
            if pictures:
                pictures.note()
            if self._options.hook:
                set_webhook(
                    self._session.redis,
                    self.run.id,
                    self._options.hook,
                    of_jobs=self._options.webhook_jobs,
                )
        has_ended = False
        try:
            with self._session.queue_errors(), Journal(self._wanted, self.run.id) as journal:
                outcome = self._feed_until_over(journal)
            has_ended = outcome.state == "finished"
            return outcome
        except PromptFileError:
            has_ended = True
            raise
        finally:
            if self._rejects:
                self._rejects.close()
            if self._downloads:
                self._downloads.close()
            with self._session.queue_errors():
                self.run.release(unlist=has_ended)

    def _choose_manifest(self) -> None:
        named = self._options.manifest is not None
        self._manifest = manifest_path.choose(self._wanted, self.run.noted("manifest") or "", is_named=named)
        if self._manifest.name != self._wanted.name:
            self._display.notice(
                f"{self._wanted} is there already, and not as this run wrote it: it stays, and this run "
                f"writes {self._manifest}."
            )

    def _run_of(self, digest: str) -> Run:
        ttl_s = self._session.settings.record_ttl_s
        return Run(self._session.redis, self._options.run or digest[:16], digest, ttl_s)

    def _go_on_as_begun(self) -> None:
        """Take the plan and the limits of the version that the run was begun with."""
        plan = self._plan.as_begun(self._is_begun)
        if plan is not self._plan:
            self.run = self._run_of(plan.digest)
            self._display.notice(
                f"An earlier version began the run {self.run.id}: its files are read as they were then. "
                "With another --run they are read anew; pictures in the bucket are kept."
            )
        self._plan = replace(plan, is_new=has_new_limits(self.run))
        self._pinned = Pinned(self.run, self._session.fleet, self._gate, is_new=self._plan.is_new)
        self._results = Results(self.run, self._session, plan.tenant)

    def _is_begun(self, digest: str) -> bool:
        """Whether a run of the plan with that digest has sent something and was not cancelled.

        A name that the user gave stands for its plan in any case.
        """
        run = self._run_of(digest)
        if run.noted("what") != digest:
            return False
        is_named = self._options.run is not None
        return is_named or (run.noted("cursor") is not None and run.noted("cancelled") is None)

    def _feed_until_over(self, journal: Journal) -> Outcome:
        status = self.run.status()
        self._go_to(status)
        if status.is_over and status.total:
            have = counted(status.total, "job has", "jobs have")
            self._display.notice(f"This run is over already: its {have} ended before, and nothing is sent.")
        if status.is_over and self.run.noted("manifest") == manifest_path.fingerprint(self._manifest):
            if not self._downloads and not self.run.outcomes():
                return self._outcome("finished", status, journal)
            if self._manifest.suffix.lower() != ".csv":
                journal.adopt(self._manifest, [each.name for each in self._plan.sources])
        if self._downloads:
            if status.is_over:
                jobs = self._plan.items(self._pinned.resolver)
                self._results.complete(journal, jobs, self._downloads.storage)
            self._downloads.resume(journal)
        self._received_at = time.monotonic()
        while (state := self._turn(journal)) is None:
            pass
        status = self.run.status()
        if state == "finished":
            self._finish(journal)
        return self._outcome(state, status, journal)

    def _go_to(self, status: Status) -> None:
        """Read the files from the run's cursor on."""
        start = Cursor.read(status.cursor)
        self._cursor, self._rejected = status.cursor, status.rejected
        if self._rejects:
            self._rejects.close()
        own = OwnFiles.read(self.run.noted(REJECTED_FILES), status.rejected)
        self._rejects = Rejects(
            self._plan.sources,
            start,
            own,
            lambda files: self.run.note(REJECTED_FILES, files),
            self._display.notice,
        )
        self._windows.begin(self._plan.items(self._pinned.resolver, start, self._display.notice))

    def _turn(self, journal: Journal) -> str | None:
        """Poll the run once and act on it. Returns how the call ends, or None while it goes on."""
        status = self.run.status()
        progressed = self._receive(journal)
        self._show(status, journal)
        if status.is_over and not progressed and (not self._downloads or self._downloads.flush(journal)):
            return "finished"
        if status.is_cancelled:
            return "cancelled"
        if self._options.detach and status.total is not None and not status.is_over:
            return "detached"
        if self._stop.is_set():
            if status.ended >= status.fed and not progressed:
                return "stopped"
        elif status.total is None and (room := self._room(status)):
            progressed = self._send_window(status, room) or progressed
        if not progressed:
            if status.waiting and not self._told_of_waiting:
                self._told_of_waiting = True
                wait = counted(status.waiting, "job waits", "jobs wait")
                self._display.notice(f"{wait} for the pictures of jobs that are not done.")
            if status.queued == status.parked and status.ended < status.fed:
                self._send_lost_again(status)
            time.sleep(POLL_EVERY_S)
        return None

    def _room(self, status: Status) -> int:
        """Jobs that may be sent now; 0 until there is room for half a window."""
        if self._options.detach:
            return WINDOW
        room = self._options.max_queued - status.queued - status.waiting
        return min(WINDOW, room) if room >= min(WINDOW, self._options.max_queued) // 2 else 0

    # Sending.

    def _send_window(self, status: Status, room: int) -> bool:
        """Send what there is room for. False: the gate lets nothing through now."""
        if status.cursor != self._cursor:
            self._display.notice("Redis has lost the jobs that were sent last: they are sent again.")
            self._go_to(status)
        messages: list[Sent] = []
        cursor, total = status.cursor, None
        at = self.run.now()
        window, is_last = self._windows.next(status.fed, WINDOW, room)
        for each in window:
            cursor = str(each.cursor)
            if isinstance(each, Rejected):
                self._reject(each)
            else:
                number = status.fed + len(messages)
                messages.append(self._messages.of(each, self.run.id, number, at))
        if self._plan.pictures:
            self._plan.pictures.store(each.templated.shape for each in window if isinstance(each, Planned))
        if is_last:
            total = status.fed + len(messages)
        elif not window:
            return False
        is_sent = self.run.feed(status.fed, messages, cursor, total, self._rejected)
        self._messages.sent()
        self._cursor = cursor if is_sent else None
        return True

    def _reject(self, rejected: Rejected) -> None:
        assert self._rejects is not None  # noqa: S101 - made before the first poll
        self._rejected += 1
        self._rejects.write(rejected)
        self._display.rejected(rejected, self._plan.sources[rejected.file].name)

    def _send_lost_again(self, status: Status) -> None:
        """Send jobs again whose messages were purged, or lost with a Redis that died."""
        all_wait = status.ended + status.waiting >= status.fed
        if time.monotonic() - self._received_at < (QUIET_WAITING_S if all_wait else QUIET_S):
            return
        self._received_at = time.monotonic()
        if status.parked and not self._told_of_parked:
            self._told_of_parked = True
            self._display.notice(
                f"{counted(status.parked, 'message waits', 'messages wait')} for a newer worker, "
                "which alone reads them: upgrade one."
            )
        lost = self.run.lost(status.fed)
        if not lost:
            return
        missing: list[tuple[int, Planned]] = []
        number = 0
        for each in self._plan.items(self._pinned.resolver):
            if number >= status.fed:
                break
            if isinstance(each, Planned):
                if number in lost:
                    missing.append((number, each))
                number += 1
        in_flight = self.run.are_in_flight([job.templated.id for _, job in missing])
        missing = [job for job, is_there in zip(missing, in_flight, strict=True) if not is_there]
        if not missing:
            return
        self._sent_again += 1
        if self._sent_again > MAX_SENT_AGAIN:
            first = missing[0][1].templated.id
            were = counted(len(missing), "job was", "jobs were")
            raise QueueError(
                f"{were} sent {MAX_SENT_AGAIN} times, and each time gone from the queue, {first} among them: "
                "see the workers' logs, and that nobody purges the queue."
            )
        gone = counted(len(missing), "job is gone", "jobs are gone")
        self._display.notice(f"{gone} from the queue, and sent again.")
        at, again = self.run.now(), f"-{tag_of_process()[:8]}"
        self.run.send_again(
            {number: self._messages.of(job, self.run.id, number, at, again) for number, job in missing}
        )
        self._messages.sent()

    # Receiving.

    def _receive(self, journal: Journal) -> bool:
        """Write down the outcomes of jobs. Returns whether there were any."""
        outcomes = [self._results.placed(each) for each in self.run.outcomes()]
        journal.write(outcomes)
        self.run.acknowledge()
        names = [each.name for each in self._plan.sources]
        for each in outcomes:
            self._display.ended(each, names[each.file] if each.file < len(names) else "")
            if self._downloads and each.state == "done":
                self._downloads.fetch(each.number, each.line, each.file, str(each.uri))
        if self._downloads:
            self._downloads.collect(journal)
        if outcomes:
            self._received_at = time.monotonic()
            self._sent_again = 0
        return bool(outcomes)

    def _show(self, status: Status, journal: Journal) -> None:
        if time.monotonic() - self._counted_at > 0.5:
            self._counted_at = time.monotonic()
            queues = self._messages.queues or set(self.run.queues)
            workers = self._session.fleet.serving(*queues) if queues else None
            self._counts = replace(self._count(journal), workers=workers)
        self._display.update(status, self._counts)

    def _count(self, journal: Journal) -> Counts:
        done, failed = self.run.counts()
        return Counts(done, journal.cached, failed - journal.cancelled, journal.cancelled)

    def _finish(self, journal: Journal) -> None:
        jobs = self._plan.items(self._pinned.resolver)
        draft = self._wanted.with_name(f"{self._wanted.stem}.{self.run.id}.draft{self._wanted.suffix}")
        with writing(draft):
            write_manifest(
                draft,
                jobs,
                self._plan.sources,
                lambda number, job_id: self._results.of(journal, number, job_id),
            )
            self._manifest = manifest_path.place(draft, self._wanted, self.run.noted("manifest") or "")
        self.run.note("manifest", manifest_path.fingerprint(self._manifest))

    def _outcome(self, state: str, status: Status, journal: Journal) -> Outcome:
        counts = self._count(journal)
        if state == "finished":
            journal.remove()
        return Outcome(
            run=self.run.id,
            state=state,
            sent=status.fed,
            total=status.total,
            done=counts.done,
            cached=counts.cached,
            failed=counts.failed,
            cancelled=counts.cancelled,
            rejected=status.rejected,
            rejected_files=tuple(self._rejects.paths()) if self._rejects else (),
            manifest=self._manifest if state == "finished" else None,
        )
