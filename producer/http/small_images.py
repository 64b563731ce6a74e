"""Small pictures of a job: the thumbnail of its picture, and a preview while it is rendered."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from producer.http import schema
from producer.http.auth import Reader, Shared
from producer.http.jobs import Mine, finished, own_record
from producer.http.problems import RefusedError

router = APIRouter(tags=["jobs"])

_WEBP = {"type": "string", "format": "binary"}


@router.get(
    "/v1/jobs/{job_id}/thumbnail",
    summary="Fetch a small picture",
    responses=schema.answers(200, _WEBP, 404, 409, 422, media="image/webp"),
)
async def get_thumbnail(job_id: str, caller: Reader, backend: Shared, submission: Mine = "") -> Response:
    """The picture as WebP of at most 256 pixels a side. 409 while it is not there."""
    handle, record = await backend.run(own_record, backend, caller, job_id, submission)
    result = await finished(backend, handle, record, 0)
    try:
        data = await backend.run(backend.thumbnails.get, job_id, result.data)
    except OSError:
        raise RefusedError(
            409,
            f"The picture of job {job_id} cannot be read: fetch the file, or submit the job again.",
        ) from None
    headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response(data, headers=headers, media_type="image/webp")


@router.get(
    "/v1/jobs/{job_id}/preview",
    summary="Ask for a preview",
    responses={
        **schema.answers(200, _WEBP, 404, 422, media="image/webp"),
        204: {"description": "There is none (yet), or no newer one: ask again in half a second."},
    },
)
async def get_preview(
    job_id: str,
    caller: Reader,
    backend: Shared,
    submission: Mine = "",
    after: Annotated[int, Query(ge=0, le=10_000, description="Steps of the one that you have.")] = 0,
) -> Response:
    """The latents of a running job as a tiny picture, WebP. `X-Step` has the steps that it has, as 7/20.

    Asking for it lets the worker make one, up to twice a second, for the next seconds.
    """
    handle, _ = await backend.run(own_record, backend, caller, job_id, submission)
    preview = await backend.run(backend.session.previews.ask, handle.id)
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    if preview is None or preview.step <= after:
        return Response(status_code=204, headers=headers)
    headers["X-Step"] = f"{preview.step}/{preview.steps}"
    return Response(preview.data, headers=headers, media_type="image/webp")
