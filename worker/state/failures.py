"""The jobs that failed for good, for operators: read in bulk, because there may be many thousands.

smallcat:failed          zset    ids of the jobs that failed for good, by time; see `worker.state.keys`

Beside them it lists the messages from which no worker could read a job: see `worker.contract.queues`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from worker.contract.message import RUN_MARK
from worker.contract.queues import UNDECODABLE
from worker.contract.record import State
from worker.state.keys import FAILED, job_key
from worker.state.scripts import FAILURES
from worker.state.shared_scripts import SharedScript

if TYPE_CHECKING:
    from redis.client import Redis

#: Jobs that are read or dropped in one round trip.
CHUNK: Final = 500


class Failure(NamedTuple):
    """A job that failed for good, as a list shows it. Its record has the rest."""

    #: The job's id.
    id: str
    #: Class name of the error it failed with; see `worker.contract.errors`.
    error_type: str
    #: What went wrong and what to do.
    error: str
    #: Unix seconds by Redis' clock of its last attempt; of its submission, where no worker took it.
    at: float
    #: The places it has in runs of prompt files; see `worker.contract.message.RunMark`.
    runs: tuple[str, ...]


class Unreadable(NamedTuple):
    """A message from which no worker could read a job."""

    #: Unix seconds when it was set aside; 0: unknown, an earlier version did it.
    at: float
    #: The queue that it was in.
    queue: str
    #: Why it cannot be read.
    reason: str
    #: Its bytes.
    size: int
    #: The first of them, as they were found.
    message: bytes

    @classmethod
    def parse(cls, entry: bytes) -> Unreadable:
        """The message in an entry of the list."""
        head, _, message = entry.partition(b"\n")
        try:
            known = json.loads(head)
            return cls(
                float(known["at"]), str(known["queue"]), str(known["reason"]), int(known["bytes"]), message
            )
        except (KeyError, TypeError, ValueError, RecursionError):
            return cls(0.0, "", "an earlier version could not read it", len(entry), entry)


class Failures:
    """The failed jobs of one Redis. Thread-safe."""

    def __init__(self, client: Redis) -> None:
        self._redis = client
        self._read = SharedScript(client, FAILURES)

    def list(self) -> list[Failure]:
        """All of them, the latest first. Those whose record expired are left out, and forgotten."""
        ids = [str(job_id) for job_id in self._redis.zrevrange(FAILED, 0, -1)]
        found: list[Failure] = []
        gone: list[str] = []
        for part in _parts(ids):
            for job_id, text in zip(part, self._read(keys=[job_key(job_id) for job_id in part]), strict=True):
                state, error_type, error, runs, submitted_at, attempt = json.loads(text)
                if state is False:
                    gone.append(job_id)
                elif state == State.FAILED:
                    places = tuple(mark for mark in (runs or "").split() if re.fullmatch(RUN_MARK, mark))
                    at = _time_of(attempt, submitted_at)
                    found.append(Failure(job_id, error_type or "", error or "", at, places))
        for part in _parts(gone):
            self._redis.zrem(FAILED, *part)
        # The index knows whole seconds, by another clock than the times that are shown.
        return sorted(found, key=lambda each: each.at, reverse=True)

    def unreadable(self) -> Sequence[Unreadable]:
        """The messages from which no worker could read a job, the latest first."""
        entries: Any = self._redis.execute_command("LRANGE", UNDECODABLE, 0, -1, NEVER_DECODE=True)  # type: ignore[no-untyped-call]
        return [Unreadable.parse(entry) for entry in entries]

    def drop(self, job_ids: Sequence[str]) -> int:
        """Forget these jobs. Returns how many of them were failed jobs; others stay as they are."""
        dropped = 0
        for part in _parts(job_ids):
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in part:
                    pipe.zrem(FAILED, job_id)
                removed = [job_id for job_id, count in zip(part, pipe.execute(), strict=True) if count]
            if removed:
                self._redis.delete(*map(job_key, removed))
            dropped += len(removed)
        return dropped


def _time_of(attempt: str | bool, submitted_at: str | bool) -> float:
    """Unix seconds of a job's last attempt, or else of its submission; 0 where neither can be read."""
    try:
        return float(json.loads(attempt)["at"] if isinstance(attempt, str) else submitted_at)
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0.0


def _parts(job_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (job_ids[start : start + CHUNK] for start in range(0, len(job_ids), CHUNK))
