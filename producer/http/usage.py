"""What tenants have used, for those who bill them."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query
from starlette.responses import Response

from producer.http import schema
from producer.http.auth import Reader, Shared
from producer.http.jobs import as_json
from producer.http.problems import RefusedError
from producer.http.usage_table import as_csv, period
from worker.state.usage import Usage, read_usage

router = APIRouter(tags=["usage"])

_DAY: Final = {"type": "string", "format": "date"}
_ROW: Final = {
    "type": "object",
    "title": "Usage",
    "required": list(Usage._fields),
    "properties": {
        "day": {**_DAY, "description": "UTC."},
        "tenant": {"type": "string"},
        "images": {"type": "integer", "description": "Pictures that were made."},
        "cached": {"type": "integer", "description": "Jobs answered by a picture that was there already."},
        "gpu_s": {"type": "number", "description": "Seconds of the device's time."},
        "bytes": {"type": "integer", "description": "Bytes of the pictures that were made."},
    },
}
_ANSWER: Final = {
    "type": "object",
    "required": ["usage"],
    "properties": {"usage": {"type": "array", "items": _ROW}},
}


_ANSWERS: Final = schema.answers(200, _ANSWER, 422)
_ANSWERS[200]["content"]["text/csv"] = {"schema": {"type": "string"}}


@router.get("/v1/usage", summary="What was used, by tenant and day", responses=_ANSWERS)
async def get_usage(
    caller: Reader,
    backend: Shared,
    since: Annotated[
        str, Query(description="The first day (UTC), as 2026-11-01; the month's when not given.")
    ] = "",
    until: Annotated[str, Query(description="The last day; today when not given.")] = "",
    tenant: Annotated[str, Query(description="For admins: of this tenant alone.", max_length=40)] = "",
    format: Annotated[Literal["json", "csv"], Query()] = "json",  # noqa: A002
) -> Response:
    """What your tenant has used, by day; for admins without a tenant, what all have."""
    whose: str | None = tenant or None
    if not caller.sees_all:
        if tenant not in ("", caller.tenant):
            raise RefusedError(403, "Another tenant's usage is not yours to see: leave tenant out.")
        if caller.shares:
            raise RefusedError(
                403,
                "What tenants that share pictures use is counted together: ask whoever runs the server.",
            )
        whose = caller.owner
    first, last = period(since, until)
    found = await backend.run(read_usage, backend.session.redis, first, last, whose)
    if format == "csv":
        return Response(as_csv(found), media_type="text/csv; charset=utf-8")
    return as_json({"usage": [each._asdict() for each in found]})
