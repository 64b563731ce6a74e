"""What is known of one job: its record, in Redis and beside its picture in the bucket."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from worker.contract.errors import named
from worker.contract.job import Job


class State(StrEnum):
    """Where a job is."""

    #: In Redis, waiting for a worker.
    QUEUED = "queued"
    #: On board of a worker: waiting for a seat, rendering, encoding or uploading.
    RUNNING = "running"
    #: Its picture and its record are in the bucket.
    DONE = "done"
    #: It failed for good; the error says why.
    FAILED = "failed"
    #: The caller took it back.
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to the job unless it is submitted again."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


class Timings(BaseModel):
    """Seconds a job spent in each stage; None where it did not come to it."""

    model_config = ConfigDict(frozen=True)

    #: From submission until a worker took it.
    queued: float | None = None
    #: From then until its picture was decoded.
    rendered: float | None = None
    #: From then until its picture was in the bucket, encoding included.
    uploaded: float | None = None


class Attempt(BaseModel):
    """One time that a worker took a job."""

    model_config = ConfigDict(frozen=True)

    #: 1 for the first.
    attempt: int
    #: The worker that took it.
    worker: str
    #: Unix seconds by Redis' clock when it did, or when it failed.
    at: float
    #: Class name of the error it ended with; None: it runs, is done, or ended with the worker's death.
    error_type: str | None = None
    #: What went wrong.
    error: str | None = None


class JobRecord(BaseModel):
    """What is known of one job. Frozen: a later state is another record."""

    model_config = ConfigDict(frozen=True)

    #: The job's id.
    id: str
    #: Where it is.
    state: State
    #: The job as submitted, or, once done, as rendered: with the model's defaults and revision filled in.
    job: Job
    #: Denoising steps done.
    step: int = 0
    #: Denoising steps in all; 0 until a worker took the job.
    steps: int = 0
    #: Times a worker took it; a worker that gave it back unharmed does not count.
    attempts: int = 0
    #: Each of those times.
    tries: tuple[Attempt, ...] = ()
    #: s3://bucket/key of the picture.
    uri: str | None = None
    #: Seconds in each stage.
    timings: Timings = Timings()
    #: The worker that took it last.
    worker: str | None = None
    #: Class name of the error it failed with; see `worker.contract.errors`.
    error_type: str | None = None
    #: What went wrong and what to do.
    error: str | None = None
    #: What the caller should know although the picture is there, such as a cut prompt.
    warnings: tuple[str, ...] = ()
    #: The safety checker's verdict; None: the model has none or it is off.
    nsfw: bool | None = None
    #: Whether the picture was already in the bucket.
    cached: bool = False
    #: The queue its message went to.
    queue: str = ""
    #: Unix seconds by Redis' clock when it was submitted.
    submitted_at: float = Field(default=0.0)
    #: The places it has in runs of prompt files; see `run_mark`.
    runs: tuple[str, ...] = ()

    def raise_for_state(self) -> None:
        """Raise the job's own error if it failed or was cancelled."""
        if self.state in (State.FAILED, State.CANCELLED):
            raise named(self.error_type or "JobError", self.error or f"Job {self.id} is {self.state}.")
