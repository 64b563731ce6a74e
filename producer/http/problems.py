"""Errors as HTTP answers: the problem documents of RFC 9457, whose sentences are those of our errors.

    CallerError           422, but for: UnknownJobError 404, UnknownModelError 404, JobCancelledError 409
    JobError              409: the job itself has failed
    ServiceError          503 with Retry-After
    what is HTTP's own    `RefusedError`, with its own status

A bug is a 500 that says nothing of it; the log has where it happened, and no value of a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import Response

from worker.contract.errors import (
    CallerError,
    JobCancelledError,
    JobError,
    PermanentStorageError,
    ServiceError,
    SettingsError,
    SmallcatError,
    UnknownJobError,
    UnknownModelError,
)

MEDIA_TYPE: Final = "application/problem+json"
#: Seconds after which a client may try again: while a service is away, and while it refuses for good.
RETRY_S, RETRY_LATE_S = 2, 60
#: Statuses that are in no standard.
_PHRASES: Final = {499: "Client Closed Request"}
#: Begins the type of each problem: an error's class name follows.
_TYPE: Final = "urn:smallcat:error:"


class RefusedError(Exception):
    """Raised when a request is refused for a reason that is HTTP's own, such as a missing key."""

    def __init__(
        self, status: int, detail: str, *, code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        #: Names the kind of refusal, for programs.
        self.code = code
        self.headers = dict(headers or {})


class InvalidJobsError(Exception):
    """Raised when jobs of a list are refused: nothing of the list is sent."""

    def __init__(self, errors: Sequence[tuple[int, str]], count: int) -> None:
        super().__init__(f"{len(errors)} of {count} jobs are refused, and none was sent.")
        #: The place of each in the list, from 0, and its sentence.
        self.errors = errors


def status_of(error: Exception) -> int:
    """The status of an answer that says `error`."""
    match error:
        case RefusedError():
            return error.status
        case InvalidJobsError():
            return 422
        case UnknownJobError() | UnknownModelError():
            return 404
        case JobCancelledError() | JobError():
            return 409
        case SettingsError():
            return 500
        case CallerError():
            return 422
        case ServiceError():
            return 503
        case _:
            return 500


def headers_of(error: Exception) -> dict[str, str]:
    """Its headers."""
    if isinstance(error, RefusedError):
        return error.headers
    if isinstance(error, PermanentStorageError):
        return {"Retry-After": str(RETRY_LATE_S)}
    return {"Retry-After": str(RETRY_S)} if isinstance(error, ServiceError) else {}


def sentence_of(error: Exception) -> str:
    """What it says to the caller."""
    if isinstance(error, SmallcatError | RefusedError | InvalidJobsError):
        return str(error)
    return "The server has a fault; its log says where. Nothing of it is yours to correct."


def name_of(error: Exception) -> str:
    """Its kind, for programs."""
    if isinstance(error, RefusedError) and error.code:
        return error.code
    if isinstance(error, SmallcatError):
        return type(error).__name__
    if isinstance(error, InvalidJobsError):
        return "InvalidJobError"
    return phrase_of(status_of(error)).replace(" ", "")


def phrase_of(status: int) -> str:
    """A status in words, also one that Python does not know, such as nginx's 499."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return _PHRASES.get(status, "Error")


def problem(error: Exception) -> dict[str, Any]:
    """The problem document of an error."""
    status = status_of(error)
    found: dict[str, Any] = {
        "type": f"{_TYPE}{name_of(error)}",
        "title": phrase_of(status),
        "status": status,
        "detail": sentence_of(error),
    }
    if isinstance(error, InvalidJobsError):
        found["errors"] = [{"index": index, "detail": text} for index, text in error.errors]
    return found


def answer(error: Exception) -> Response:
    """The answer that says `error`."""
    return Response(
        json.dumps(problem(error), ensure_ascii=True),
        status_of(error),
        headers_of(error),
        MEDIA_TYPE,
    )


#: The schema of a problem document.
SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457. `detail` names the value, the limit and the remedy.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "examples": [f"{_TYPE}InvalidJobError"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "examples": ["steps is 200: it must be 1 to 150."]},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "detail"],
                "properties": {"index": {"type": "integer"}, "detail": {"type": "string"}},
            },
        },
    },
}
