"""A job in the engine, from its submission to its future's result."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Generic

from worker.contract.errors import (
    JobTooLargeError,
    MachineError,
    OutOfMemoryError,
    RenderError,
    SmallcatError,
)
from worker.contract.job import Job
from worker.engine.runner import Picture, R


@dataclass(frozen=True)
class Rendered:
    """What a job's future resolves to."""

    picture: Picture
    #: What the caller should know although the picture is fine.
    warnings: tuple[str, ...]


@dataclass(eq=False)
class Ticket(Generic[R]):
    """A job in the engine, from submission to its future's result."""

    job_id: str
    job: Job
    deadline_s: float
    future: Future[Rendered] = field(default_factory=Future)
    #: Set before the ticket is in the inbox.
    render: R | None = None
    cancelled: bool = False

    def resolve(self, outcome: Rendered | BaseException) -> None:
        """Give the job's future its result or its error. A second outcome is ignored."""
        try:
            if isinstance(outcome, Rendered):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)
        except InvalidStateError:
            pass  # Resolved already: given back by a stop, while its last step ran.


def ends_the_engine(error: BaseException) -> bool:
    """Whether no other job on this machine would be spared either."""
    return isinstance(error, MachineError) and not isinstance(error, OutOfMemoryError)


def as_job_error(job: Job, error: BaseException) -> SmallcatError:
    """What failed for `job` alone, as its own error."""
    if isinstance(error, OutOfMemoryError):
        size = f"{job.width}x{job.height}"
        return JobTooLargeError(f"A job of {size} does not fit in the device's memory, even alone: {error}")
    if isinstance(error, SmallcatError):
        return error
    failure = RenderError(f"The model failed on this job alone: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
