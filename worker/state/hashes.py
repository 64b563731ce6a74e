"""A job's record as Redis holds it, in a hash, and as Python has it.

Producers write these hashes, so what is in them is not believed: the id is that of the key, the job must be
the one of that id, and what cannot be read counts as an unknown job and does not disturb others.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from worker.contract.errors import UnknownJobError
from worker.contract.job import Job
from worker.contract.message import RUN_MARK
from worker.contract.plain_text import plain
from worker.contract.record import JobRecord, State

#: What a job's id looks like.
JOB_ID: Final = re.compile(r"[0-9a-f]{32}")
#: Fields of the hash that are plain text; all others are JSON.
_TEXT: Final = {"state", "uri", "worker", "error_type", "error", "queue"}
#: Fields for people: of the job's own texts nothing is changed.
_SHOWN: Final = {"uri", "worker", "error_type", "error", "queue", "warnings"}
#: Fields that a record has from elsewhere.
_NOT_READ: Final = {"id", "runs", "tries", "waits_for"}
#: Fields that a finished job's record leaves out where they say this.
_UNSAID: Final = {"warnings": [], "cached": False}
#: Seconds by which the clock of a producer may be ahead of Redis'.
_SKEW_S: Final = 60.0
#: Fields that the record of a job that has ended does not have.
_NOT_STORED: Final = ("queue", "submitted_at", "attempts", "tries", "runs", "waits_for")
_FINAL: Final = frozenset(state.value for state in State if state.is_final)


def unknown(job_id: str, submission: str = "") -> UnknownJobError:
    """The error for a job without a record; or for a submission of it of which nothing is known."""
    if submission:
        return UnknownJobError(
            f"There is no submission {submission} of job {job_id}: that is wrong, or it expired."
        )
    return UnknownJobError(
        f"There is no record of a job {job_id}: its id is wrong or it expired. That of a finished job stays "
        "in Redis for an hour; then it is read from the bucket, where S3_BUCKET names it."
    )


def unreadable(job_id: str, why: str) -> UnknownJobError:
    """The error for a job whose record no version of ours wrote."""
    return UnknownJobError(f"The record of job {job_id} cannot be read ({why}): submit the job again.")


def wait_of(seconds: str | float, ttl_s: float) -> float | None:
    """Seconds that a job waited, by its record's time of submission; None where that cannot be right.

    Nothing that is not finite, longer than a record lives (`ttl_s`), or before the job was submitted.
    """
    try:
        waited_s = float(seconds)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(waited_s) or not -_SKEW_S <= waited_s <= ttl_s:
        return None
    return max(0.0, waited_s)


def waited_of(submitted_at: str | None, now_s: float, ttl_s: float) -> float | None:
    """Seconds from what a record says of its time of submission until `now_s`, as `wait_of` has them.

    A record that says no number counts as submitted now.
    """
    try:
        return wait_of(now_s - float(submitted_at or now_s), ttl_s)
    except ValueError:
        return 0.0


def record_of(job_id: str, fields: Mapping[str, str]) -> JobRecord:
    """The record that a hash of Redis holds. Raises `UnknownJobError` for one that is not this job's."""
    if not JOB_ID.fullmatch(job_id):
        raise unknown(job_id)
    try:
        values = {
            name: value if name in _TEXT else json.loads(value)
            for name, value in fields.items()
            if name in JobRecord.model_fields and name not in _NOT_READ
        }
        tries = [json.loads(value) for name, value in fields.items() if name.startswith("try:")]
        for each in (values, *tries):
            each |= {name: shown(each[name]) for name in _SHOWN & each.keys()}
        values["runs"] = [mark for mark in fields.get("runs", "").split() if re.fullmatch(RUN_MARK, mark)]
        if values.get("state") == State.QUEUED and "waits_for" in fields:
            waits_for = [each for each in fields["waits_for"].split() if JOB_ID.fullmatch(each)]
            values |= {"state": State.WAITING, "waits_for": waits_for}
        values["tries"] = sorted(tries, key=lambda each: int(each["attempt"]))
        record = JobRecord.model_validate(values | {"id": job_id})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if names := _fields_to_come(error):
            raise UnknownJobError(
                f"The record of job {job_id} is of a newer version of smallcat, whose jobs have {names}: "
                "upgrade this one."
            ) from None
        raise unreadable(job_id, type(error).__name__) from None
    # A job that is done has the model's defaults filled in, and so another id.
    if record.state is not State.DONE and record.job.id != job_id:
        raise UnknownJobError(f"The record of job {job_id} is another job's: submit the job again.")
    return record


def shown(text: Any) -> Any:
    """A text, or a list of texts, that may be shown as it is; whatever else it is stays."""
    if isinstance(text, list):
        return [shown(each) for each in text]
    return plain(text, keep="\n") if isinstance(text, str) else text


def _fields_to_come(error: Exception) -> str:
    """The job fields that this version does not know, where that alone is wrong with a record."""
    if not isinstance(error, ValidationError):
        return ""
    findings = error.errors(include_url=False, include_input=False)
    if any(each["type"] != "extra_forbidden" or each["loc"][0] != "job" for each in findings):
        return ""
    return ", ".join(plain(str(each["loc"][-1]))[:40] for each in findings[:5])


def readable(job_id: str, fields: object) -> JobRecord | None:
    """The record in what Redis answered; None where there is none, or none that can be read."""
    if not isinstance(fields, dict) or "job" not in fields:
        return None
    try:
        return record_of(job_id, fields)
    except UnknownJobError:
        return None


def fields_of(record: JobRecord) -> dict[str, str]:
    """What the record of a finished job adds to its hash: nothing that is at its default."""
    values = record.model_dump(mode="json", exclude={"id", "state", *_NOT_STORED})
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None and value != _UNSAID.get(name)
    }


def is_in_doubt(fields: Mapping[str, str], submission: str) -> bool:
    """Whether the submission may have been given up. The record has those that were not."""
    return bool(submission) and f"sub:{submission}" not in fields


def seen_by(text: str | None, record: JobRecord) -> JobRecord:
    """The record as a submission sees it, by the text of its key, whatever became of the job since."""
    outcome = (text or "")[:1]
    if outcome == "+":
        # It is not among those of the record: its own one, of a job that was done, has expired.
        outcome = "="
    if outcome == "-":
        return record.given_up()
    if outcome == "=" and record.state is not State.DONE:
        ended = {"step": record.steps, "error_type": None, "error": None, "uri": None}
        return record.model_copy(update={"state": State.DONE, **ended})
    return record


def own_fields(text: str) -> dict[str, Any]:
    """What is a submission's own, in the text of its key; empty where that cannot be read."""
    try:
        fields = json.loads(text[1:])
        job = Job.model_validate({"prompt": "x"} | fields)
    except (ValueError, TypeError, RecursionError):
        return {}
    return {name: getattr(job, name) for name in fields}


def says_final(event: object) -> bool:
    """Whether an event of a job's channel says that it has ended, or that a submission was given up."""
    return isinstance(event, str) and event in _FINAL


def may_be_final(receive: Callable[[float], str | None], timeout_s: float) -> bool:
    """Whether, within `timeout_s` seconds, an event says that the job has ended, or may have been missed."""
    until = time.monotonic() + timeout_s
    while (left := until - time.monotonic()) > 0:
        state = receive(left)
        if state is None:
            # Back before its time: the subscription was made just now, at first or after a lost connection,
            # and what was published before was missed.
            return until - time.monotonic() > 0.05
        if says_final(state):
            return True
    return False


def count(text: str | None) -> int:
    """A number of a hash; 0 where it is missing or no number."""
    return int(text) if text and re.fullmatch("[0-9]{1,9}", text) else 0
