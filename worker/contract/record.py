"""What is known of one job: its record, in Redis and beside its picture in the bucket."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from worker.contract.errors import JobCancelledError, named
from worker.contract.job import SUBMISSION_FIELDS, Job


class State(StrEnum):
    """What has become of a job so far."""

    #: In Redis, waiting for the pictures of other jobs with which it begins. No queue has it yet.
    WAITING = "waiting"
    #: In Redis, waiting for a worker.
    QUEUED = "queued"
    #: In flight on a worker: waiting for a slot of a batch, rendered, encoded or uploaded.
    RUNNING = "running"
    #: Its picture and its record are in the bucket.
    DONE = "done"
    #: It failed for good; the error says why.
    FAILED = "failed"
    #: The caller cancelled it.
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to the job unless it is submitted again."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


class Timings(BaseModel):
    """Seconds that a job spent in each stage; None for a stage that it did not reach."""

    model_config = ConfigDict(frozen=True)

    #: From submission until a worker took it.
    queued: float | None = None
    #: From then until its picture was decoded.
    rendered: float | None = None
    #: From then until its picture was in the bucket, encoding included.
    uploaded: float | None = None


class Attempt(BaseModel):
    """One attempt at a job."""

    model_config = ConfigDict(frozen=True)

    #: 1 for the first.
    attempt: int
    #: The worker that took it.
    worker: str
    #: Unix seconds when it took the job, by Redis' clock; once it failed, when, by the worker's clock.
    at: float
    #: Class name of the error it ended with; None: it runs, it succeeded, or the worker died.
    error_type: str | None = None
    #: What went wrong.
    error: str | None = None


def _as_it_was(job: Job) -> Job:
    """A job of a record has its syntax and its tenant, also where they are left out: submitted again, too."""
    return job.model_copy(update={"prompt_syntax": job.prompt_syntax, "tenant": job.tenant})


class JobRecord(BaseModel):
    """What is known of one job. Frozen: a change makes another record."""

    model_config = ConfigDict(frozen=True)

    #: The job's id.
    id: str
    #: Its state.
    state: State
    #: The job as submitted, or, once done, as rendered: with the model's defaults and revision filled in.
    job: Annotated[Job, AfterValidator(_as_it_was)]
    #: Denoising steps done, of those that the job asks for: Heun evaluates the model twice in one step.
    step: int = 0
    #: Denoising steps that the job asks for; 0 until a worker renders the job.
    steps: int = 0
    #: Attempts so far; one that was given back for a reason that was not the job's does not count.
    attempts: int = 0
    #: Each of them.
    tries: tuple[Attempt, ...] = ()
    #: s3://bucket/key of the picture.
    uri: str | None = None
    #: Seconds in each stage of the last attempt.
    timings: Timings = Timings()
    #: The worker that took it last.
    worker: str | None = None
    #: Class name of the error it failed with; see `worker.contract.errors`.
    error_type: str | None = None
    #: What went wrong and what to do.
    error: str | None = None
    #: What the caller should know although the picture was made, such as that the prompt was cut.
    warnings: tuple[str, ...] = ()
    #: The safety checker's verdict; None: the model has none or it is off.
    nsfw: bool | None = None
    #: Whether the picture was already in the bucket.
    cached: bool = False
    #: The queue its message went to.
    queue: str = ""
    #: Unix seconds when it was submitted, by Redis' clock.
    submitted_at: float = Field(default=0.0)
    #: The ids of the jobs whose pictures it waits for.
    waits_for: tuple[str, ...] = ()
    #: Its marks in runs of prompt files; see `worker.contract.message.RunMark`.
    runs: tuple[str, ...] = ()

    def given_up(self) -> Self:
        """As a submission that was given up sees it: without a picture, whatever became of the job."""
        error = JobCancelledError("The job was cancelled.")
        fields = {"error_type": type(error).__name__, "error": str(error), "uri": None}
        return self.model_copy(update={"state": State.CANCELLED, **fields})

    def with_own(self, own: Mapping[str, Any]) -> Self:
        """As the submission with these fields of its own sees it: what `own` lacks is at its default."""
        names = {name: Job.model_fields[name] for name in SUBMISSION_FIELDS}
        blank = {name: field.get_default(call_default_factory=True) for name, field in names.items()}
        return self.model_copy(update={"job": self.job.model_copy(update={**blank, **own})})

    def raise_for_state(self) -> None:
        """Raise the job's own error if it failed or was cancelled."""
        if self.state in (State.FAILED, State.CANCELLED):
            raise named(self.error_type or "JobError", self.error or f"Job {self.id} is {self.state}.")
