"""What happens to a job after a failed attempt: pure decisions, without Redis, clock or threads.

Whose fault the failure is (`worker.contract.errors`) decides:

    the caller's     the job fails
    the job's        it is tried again, each time after a longer pause; it fails with its last attempt
    the machine's    the message goes back to the queue, and the attempt does not count
    the engine's     the same, but it counts as the death of a worker, since a job may be why
    a service's      the job fails: the request was repeated before (`worker.jobs.storage_retry`)

A worker that dies reports no failure. `claim.lua` counts its attempt, too, and lets nobody have a job whose
attempts are used up: that is a poison job. Its last attempt is made alone, so that no other job loses an
attempt with it. An engine that fails is the same to its jobs: the process ends. Where its device failed, that
is seldom a job's fault: it uses up an attempt only of a job that had the device to itself. A job in whose
attempts devices failed again and again has it to itself.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from worker.contract.errors import (
    EngineFailedError,
    JobCancelledError,
    JobError,
    MachineError,
    PoisonJobError,
    SmallcatError,
)


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts: each is twice as long as the one before, up to a limit."""

    #: Seconds, > 0: the first pause.
    first_s: float
    #: Seconds, >= `first_s`: the longest pause.
    longest_s: float

    def pause_s(self, failures: int) -> float:
        """Seconds to wait after so many failures (>= 1) in a row, at most."""
        # Past some forty failures the power is far above any limit, and a larger one would overflow.
        return min(self.first_s * 2.0 ** min(failures - 1, 40), self.longest_s)

    def jittered_s(self, failures: int, chance: float) -> float:
        """Half of `pause_s` to all of it, so that a fleet does not retry all at once. `chance`: 0 to 1."""
        return self.pause_s(failures) * (0.5 + 0.5 * chance)


#: Between two attempts at a job that failed.
JOB_BACKOFF: Final = Backoff(2.0, 60.0)


class Verdict(enum.Enum):
    """What becomes of a job after a failed attempt."""

    #: Its message goes back to the queue at once; the attempt does not count.
    GIVE_BACK = enum.auto()
    #: The same, but the death of its worker counts; the attempt does not.
    SUSPECT = enum.auto()
    #: The same, and the attempt counts: as that of a worker that died.
    DEATH = enum.auto()
    #: It is tried again after a pause.
    RETRY = enum.auto()
    #: It has failed for good.
    FAIL = enum.auto()
    #: It is cancelled.
    CANCEL = enum.auto()


@dataclass(frozen=True)
class RetryPolicy:
    """The rules for one worker."""

    #: Attempts at a job, >= 1: `SMALLCAT_MAX_ATTEMPTS`.
    max_attempts: int

    def verdict(self, error: SmallcatError, attempt: int, *, alone: bool = False) -> Verdict:
        """What becomes of a job whose attempt number `attempt` (>= 1) ended with `error`.

        `alone`: no other job was in the engine.
        """
        if isinstance(error, EngineFailedError):
            return Verdict.DEATH if alone or not error.by_machine else Verdict.SUSPECT
        if isinstance(error, MachineError):
            return Verdict.GIVE_BACK
        if isinstance(error, JobCancelledError):
            return Verdict.CANCEL
        may_pass = isinstance(error, JobError) and not isinstance(error, PoisonJobError)
        return Verdict.RETRY if may_pass and attempt < self.max_attempts else Verdict.FAIL

    def pause_s(self, attempt: int, chance: float) -> float:
        """Seconds from the failed attempt number `attempt` (>= 1) to the next; `chance` is from 0 to 1."""
        return JOB_BACKOFF.jittered_s(attempt, chance)

    def runs_alone(self, attempts: int, deaths: int) -> bool:
        """Whether the next attempt must be made alone, after so many attempts and deaths of workers.

        It must when it is the last one and an earlier one ended with the death of its worker; and after as
        many deaths as would leave one attempt, had they used up any.
        """
        last = self.max_attempts - 1
        return deaths > 0 and attempts <= last <= max(attempts, deaths)

    def poison(self, attempts: int) -> PoisonJobError:
        """The error of a job whose attempts are used up without a failure that was reported."""
        return PoisonJobError(
            f"The job was tried {attempts} times (SMALLCAT_MAX_ATTEMPTS), and its worker died: see its tries."
        )
