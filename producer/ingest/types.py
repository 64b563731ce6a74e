"""What a run of prompt files takes and returns: its options, its display and its outcome."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from worker.contract.plain_text import plain

if TYPE_CHECKING:
    from producer.ingest.ended import Ended
    from producer.ingest.message_templates import TemplatedJob
    from producer.ingest.plan import Rejected
    from producer.ingest.run_state import Status
    from worker.contract.job import Job

#: Default of the messages that may wait in a run's queues.
MAX_QUEUED = 10_000
#: Default priority of a file's jobs: below that of single jobs, for which somebody waits.
FILE_PRIORITY = 3


class Display(Protocol):
    """Shows a run to a person or a log."""

    def update(self, status: Status, counts: Counts) -> None:
        """How far the run is; called about ten times a second."""

    def ended(self, ended: Ended, file: str) -> None:
        """A job of the file of that name has ended."""

    def rejected(self, rejected: Rejected, file: str) -> None:
        """A line of the file is rejected."""

    def notice(self, text: str) -> None:
        """Something that a person should know, in a sentence."""


class SilentDisplay(Display):
    """Prints notices alone, on standard error: the display of `submit_file`."""

    def update(self, status: Status, counts: Counts) -> None:
        """Nothing."""

    def ended(self, ended: Ended, file: str) -> None:
        """Nothing."""

    def rejected(self, rejected: Rejected, file: str) -> None:
        """Nothing: the file of rejected lines has it."""

    def notice(self, text: str) -> None:
        """One line."""
        print(plain(text), file=sys.stderr)


class Gate:
    """What of a run may be sent, and when. This one lets all through."""

    def check(self, job: Job) -> None:
        """Raise `InvalidJobError` for a job that is rejected. Whenever it is asked, it says the same."""

    def check_unserved(self, job: Job) -> None:
        """Likewise for a job whose model nobody served when the run first named it."""

    def admit(self, first: int, jobs: Sequence[TemplatedJob]) -> tuple[int, str]:
        """How many of the run's next jobs may be sent now; why not the others, in a sentence.

        `first` is the number of the first of them in the run.
        """
        return len(jobs), ""


@dataclass(frozen=True)
class Counts:
    """How many jobs of a run have ended in which way, so far."""

    done: int = 0
    #: Jobs that are done because their picture was in the bucket already; `done` includes them.
    cached: int = 0
    failed: int = 0
    cancelled: int = 0
    #: Live workers that serve the run's queues; None until something was sent.
    workers: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a call of `ingest` ended."""

    #: The run's id.
    run: str
    #: `finished`; `stopped` (the next call sends the rest); `detached` (everything is queued); `cancelled`
    #: (by `cancel --run`; the next call begins anew, and finds what is done in the bucket).
    state: str
    #: Jobs sent.
    sent: int
    #: Jobs in all; None where the end of the files was not reached.
    total: int | None
    #: Jobs whose picture is in the bucket.
    done: int
    #: Of those, the ones whose picture was in the bucket already.
    cached: int
    #: Jobs that failed for good.
    failed: int
    #: Jobs that were cancelled.
    cancelled: int
    #: Lines rejected.
    rejected: int
    #: The files that list them.
    rejected_files: tuple[Path, ...]
    #: The manifest; None unless the run is finished.
    manifest: Path | None

    @property
    def is_clean(self) -> bool:
        """Whether every line became a picture."""
        return not (self.failed or self.cancelled or self.rejected)


@dataclass(frozen=True)
class Options:
    """How a run is fed. None of it changes the run's jobs."""

    #: Where the manifest goes; None: beside the first file.
    manifest: Path | None = None
    #: The run's name: up to 40 lower-case letters and digits. None: a hash of its files and options.
    run: str | None = None
    #: Messages that may wait in the run's queues, >= 1.
    max_queued: int = MAX_QUEUED
    #: Queue everything and return.
    detach: bool = False
    #: Send nothing if any line is wrong.
    strict: bool = False
    #: What is told when the run is over (`worker.contract.webhook.hook_of`); empty: nothing.
    hook: str = ""
    #: Whether it is told of each job as well.
    webhook_jobs: bool = False
