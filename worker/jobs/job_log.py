"""A job's way through a worker, in the log and in its trace.

In the log it is one line for each event, with its figures as fields for programs.
"""

from __future__ import annotations

import logging

from worker.contract.errors import SmallcatError
from worker.contract.plain_text import plain
from worker.engine.ticket import Rendered
from worker.state.records import Claim
from worker.tracing import attempts

logger = logging.getLogger("smallcat.jobs")

#: Why a message is not worked on.
_NOT_BEGUN = {
    Claim.TAKEN: "another message of it is worked on",
    Claim.FINAL: "it has ended",
    Claim.WAITING: "it waits for other jobs' pictures",
    Claim.DROPPED: "its run was cancelled",
}


#: How an attempt ended that has no picture, by the level of its line.
_OUTCOMES = {logging.WARNING: "retried", logging.INFO: "cancelled"}


def begun(job_id: str, attempt: int, queued_s: float | None, worker: str) -> None:
    """The job was claimed: an attempt begins on `worker`. `queued_s`: None is not known."""
    # Later attempts have waited since the one before, and nobody knows how long.
    attempts.note(queued_s if attempt == 1 else None, attempt=attempt, worker=worker)
    if queued_s is None:
        _event("Job %s begins: attempt %d.", job_id, attempt, attempt=attempt)
        return
    _event(
        "Job %s begins: attempt %d, %.3g s after it was submitted.",
        *(job_id, attempt, queued_s),
        attempt=attempt,
        queued_s=queued_s,
    )


def not_begun(job_id: str, claim: Claim) -> None:
    """The message is acknowledged without any work, or comes back later."""
    attempts.note(outcome=str(claim))
    _event("Job %s is not begun: %s.", job_id, _NOT_BEGUN[claim], claim=str(claim))


def rendered(job_id: str, steps: int, seconds: float, rendered: Rendered) -> None:
    """The picture is in memory. `seconds`: in the engine."""
    _event(
        "Job %s is rendered: %d steps in %.3g s, of which it had %.3g s of the device.",
        *(job_id, steps, seconds, rendered.device_s),
        steps=steps,
        rendered_s=seconds,
        device_s=rendered.device_s,
        decode_s=rendered.decode_s,
    )


def done(job_id: str, size: int, uploaded_s: float) -> None:
    """The picture is stored. `uploaded_s`: since it was rendered."""
    attempts.note(outcome="done")
    _event(
        "Job %s is done: %d bytes, encoded and stored in %.3g s.",
        *(job_id, size, uploaded_s),
        size=size,
        uploaded_s=uploaded_s,
    )


def cached(job_id: str) -> None:
    """The picture was in the bucket."""
    attempts.note(outcome="cached")
    _event("Job %s is done: its picture was in the bucket.", job_id, cached=True)


def failed(job_id: str, attempt: int, error: SmallcatError, level: int) -> None:
    """An attempt has failed, for good unless `level` is that of a warning; or the job was cancelled."""
    name, text = type(error).__name__, str(error)
    what = {logging.WARNING: "failed and is made again", logging.INFO: "is cancelled"}.get(level, "failed")
    fields = {"attempt": attempt, "error": name, "text": text}
    attempts.note(outcome=_OUTCOMES.get(level, "failed"))
    if level > logging.INFO:
        attempts.failed(error)
    logger.log(
        level,
        "Job %s: attempt %d %s: %s: %s",
        *(job_id, attempt, what, name, plain(text)),
        extra={"job": job_id, "fields": fields},
    )


def _event(text: str, job_id: str, *args: object, **fields: object) -> None:
    rounded = {name: round(each, 6) if isinstance(each, float) else each for name, each in fields.items()}
    logger.info(text, job_id, *args, extra={"job": job_id, "fields": rounded})
