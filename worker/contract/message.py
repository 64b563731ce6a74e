"""What travels through Redis for a job, written and read here alone."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.contract.errors import InvalidJobError, NewerMessageError
from worker.contract.job import DEFAULT_PRIORITY, FORMAT_VERSION, MAX_PRIORITY, Job

#: The one task.
RENDER = "smallcat.render"
#: The priority, as Redis' count (see `message_priority`), of a job that somebody waits for: what `submit_job`
#: sends unless it is told otherwise. Prompt files are behind it.
URGENT = MAX_PRIORITY - DEFAULT_PRIORITY
#: A job's place in a run: run, index, file, line, when it was sent.
RUN_MARK = r"[0-9a-z]{1,40}(:[0-9]{1,12}){4}"


class Message(BaseModel):
    """What travels through Redis."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: `FORMAT_VERSION` of the producer.
    version: int
    #: The job's id, as the producer computed it.
    id: str
    #: The job.
    job: Job
    #: Its place in a prompt file's run, as `worker.contract.message.run_mark` writes it; empty: it has none.
    run: str = Field(default="", pattern=rf"^({RUN_MARK})?$")

    @classmethod
    def parse(cls, payload: object) -> Message:
        """The message in `payload`. Raises `NewerMessageError`, `InvalidJobError`."""
        version = payload.get("version") if isinstance(payload, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerMessageError(
                f"A message is of version {version}, this worker reads up to {FORMAT_VERSION}: update it."
            )
        try:
            message = cls.model_validate(payload)
        except ValidationError as error:
            finding = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in finding["loc"]) or "it"
            raise InvalidJobError(f"A message is not a job: {where}: {finding['msg']}.") from None
        if message.id != message.job.id:
            raise InvalidJobError(f"A message says id {message.id}, its job's id is {message.job.id}.")
        return message


def message_of(job: Job, run: str = "") -> dict[str, object]:
    """What travels through Redis for `job`: versioned, and nothing but JSON.

    `run` is its place in a prompt file's run (`worker.contract.message.run_mark`), where it has one.
    """
    message = {"version": FORMAT_VERSION, "id": job.id, "job": job.model_dump(mode="json")}
    return message | {"run": run} if run else message


def args_repr(prompt: str, seed: int) -> str:
    """What Flower shows of a message. Celery's own would cost more time than all else, and more memory."""
    return f"({prompt[:80]!r}, seed {seed})"


def message_priority(job: Job) -> int:
    """Redis' priorities count backwards: 0 is fetched first."""
    return MAX_PRIORITY - job.priority


def run_mark(run: str, index: int, file: int, line: int, at: int) -> str:
    """What the message of a run's job says of it. `RUN_MARK` is its form.

    `index` is the job's bit, `file` and `line` say where it stands, `at` is when it was sent (Unix s).
    """
    return f"{run}:{index}:{file}:{line}:{at}"
