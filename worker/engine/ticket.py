"""A job in the engine, from its submission to the result of its future."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Generic

from worker.contract.errors import (
    EngineFailedError,
    JobTooLargeError,
    MachineError,
    OutOfMemoryError,
    RenderError,
    SmallcatError,
)
from worker.contract.job import Job
from worker.engine.runner import FirstPass, JobInputs, Picture, StateT
from worker.engine.step_watch import StepWatch


@dataclass(frozen=True)
class Rendered:
    """The result of a job's future."""

    picture: Picture
    #: What the caller should know although the picture is fine.
    warnings: tuple[str, ...]
    #: Its share of the device's time: of each of its steps by its rows, in seconds.
    device_s: float = 0.0
    #: Seconds from its last step until its picture was decoded.
    decode_s: float = 0.0


@dataclass(eq=False)
class Ticket(Generic[StateT]):
    """A job in the engine. Two tickets of equal jobs are not equal."""

    job_id: str
    job: Job
    #: On the engine's clock, in seconds.
    deadline_s: float
    #: What its present pass begins with: its pictures, or its first pass; None: noise.
    inputs: JobInputs | FirstPass | None = None
    future: Future[Rendered] = field(default_factory=Future)
    #: Set once the job is prepared, and another one once its second pass is.
    state: StateT | None = None
    #: Whether `state` is that of the present pass.
    is_prepared: bool = False
    #: When it was ready for its first step, by the engine's clock; None: it is not.
    ready_s: float | None = None
    cancelled: bool = False
    #: Its share of the steps so far, in seconds.
    device_s: float = 0.0
    #: Notes its steps; None: nobody wants to know.
    watch: StepWatch | None = None
    #: When its last step ended, by the engine's clock; None: it has not.
    stepped_s: float | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and steps that the job asks for in all its passes; (0, 0) until it is prepared.

        The model may be evaluated more often than that (`worker.engine.runner.JobState.steps`).
        """
        is_second = isinstance(self.inputs, FirstPass)
        if (state := self.state) is None:
            return 0, 0
        first = self.job.steps or state.steps
        asked = self.job.all_steps or first
        if is_second and not self.is_prepared:
            return first, asked
        before, of_pass = (first, asked - first) if is_second else (0, first)
        return before + state.step * of_pass // state.steps, asked

    def decode_s(self, now_s: float) -> float:
        """Seconds from its last step until `now_s`; 0 where it had none."""
        return 0.0 if self.stepped_s is None else now_s - self.stepped_s

    def resolve(self, outcome: Rendered | BaseException) -> None:
        """Give the job's future its result or its error. A second outcome is ignored."""
        try:
            if isinstance(outcome, Rendered):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)
        except InvalidStateError:
            pass  # `Engine.stop` gave the job back while its last step ran.


def shared(batch: Sequence[Ticket[StateT]], rows: Sequence[int], began_s: float, ended_s: float) -> float:
    """Share the seconds of a step among its jobs, by the rows that each had in it. Returns the seconds."""
    seconds, every = ended_s - began_s, sum(rows)
    for ticket, own in zip(batch, rows, strict=True):
        ticket.device_s += seconds * own / every
    if watches := [ticket.watch for ticket in batch if ticket.watch is not None]:
        names = [watch.name for watch in watches]
        for watch in watches:
            watch.stepped(began_s, ended_s, every, names)
    return seconds


def is_machine_fault(error: BaseException) -> bool:
    """Whether the machine failed and no job: then every other job would fail too, and the engine ends."""
    return isinstance(error, MachineError) and not isinstance(error, OutOfMemoryError)


def engine_failed(fault: BaseException) -> EngineFailedError:
    """The error of all jobs that the engine had when `fault` ended it."""
    error = EngineFailedError(f"The engine failed ({fault!r}): the job goes back to the queue.")
    error.by_machine = is_machine_fault(fault)
    return error


def as_job_error(job: Job, error: BaseException) -> SmallcatError:
    """The error of `job` for whatever was raised while it ran alone."""
    if isinstance(error, OutOfMemoryError):
        size = "x".join(map(str, job.picture_size))
        return JobTooLargeError(f"A job of {size} does not fit in the device's memory, even alone: {error}")
    if isinstance(error, SmallcatError):
        return error
    failure = RenderError(f"The model failed on this job alone: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
