"""What a run of prompt files is given, and what it gives: options, a display, an outcome."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from producer.ingest.plan import Rejected
    from producer.ingest.run_state import Ended, Status

#: Messages that may wait in a run's queues, unless it is said otherwise.
MAX_QUEUED = 10_000
#: Priority of a file's jobs, unless it is said otherwise: whoever waits for a single job goes first.
FILE_PRIORITY = 3


class Display(Protocol):
    """Who watches a run."""

    def update(self, status: Status, counts: Counts) -> None:
        """How far it is; called about ten times a second."""

    def ended(self, ended: Ended) -> None:
        """A job has ended."""

    def rejected(self, rejected: Rejected, file: str) -> None:
        """A line is no job."""

    def say(self, text: str) -> None:
        """Something to know."""


class SilentDisplay(Display):
    """Says nothing but what must be said, on standard error: how `submit_file` is watched."""

    def update(self, status: Status, counts: Counts) -> None:
        """Nothing."""

    def ended(self, ended: Ended) -> None:
        """Nothing."""

    def rejected(self, rejected: Rejected, file: str) -> None:
        """Nothing: the file of rejected lines has it."""

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr)


@dataclass(frozen=True)
class Counts:
    """How many jobs of a run ended in which way, so far."""

    done: int = 0
    #: Of those done, the ones whose picture was in the bucket already.
    cached: int = 0
    failed: int = 0
    cancelled: int = 0
    #: Live workers that serve the run's queues.
    workers: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a call of `ingest` ended."""

    #: The run's id.
    run: str
    #: `finished`; `stopped` (the rest is for the next call); `detached` (all is queued).
    state: str
    #: Jobs sent, and in all once that is known.
    sent: int
    total: int | None
    done: int
    cached: int
    failed: int
    cancelled: int
    #: Lines that are no jobs, and where they are listed.
    rejected: int
    rejected_files: tuple[Path, ...]
    #: The manifest; None unless the run is finished.
    manifest: Path | None

    @property
    def is_clean(self) -> bool:
        """Whether every line became a picture."""
        return not (self.failed or self.cancelled or self.rejected)


@dataclass(frozen=True)
class Options:
    """How a run is fed; none of this changes its jobs."""

    #: Where the manifest goes; None: beside the first file.
    manifest: Path | None = None
    #: The run's name: up to 40 lower-case letters and digits. None: made from its files and options.
    run: str | None = None
    #: Messages that may wait in the run's queues, >= 1.
    max_queued: int = MAX_QUEUED
    #: Queue everything and return.
    detach: bool = False
