"""Our own API for pictures that are sent before the jobs, or the prompt file, that name them."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from producer.http import pictures, schema
from producer.http.auth import Shared, Submitter
from producer.http.guard import INPUTS
from producer.http.jobs import as_json
from producer.http.problems import RefusedError
from worker.contract.input_reference import FILE_REFERENCE, MAX_INPUT_SIDE, InputReference

router = APIRouter(tags=["inputs"])

_SIDE: Final = {"type": "integer", "minimum": 1, "maximum": MAX_INPUT_SIDE}
_INPUT: Final = {
    "type": "object",
    "title": "Input",
    "required": ["reference", "width", "height"],
    "properties": {
        "reference": {
            "type": "string",
            "pattern": f"^{FILE_REFERENCE}$",
            "description": "What jobs and lines of prompt files have as image or mask.",
        },
        "width": {**_SIDE, "description": "Pixels, after the turn that its Exif says."},
        "height": _SIDE,
    },
}


@router.post(
    INPUTS,
    status_code=201,
    summary="Store a picture that jobs are to begin with",
    openapi_extra=schema.file_body("The picture's file as it is: PNG, JPEG or WebP."),
    responses=schema.answers(201, _INPUT, 413, 415, 422),
)
async def store_input(
    request: Request,
    caller: Submitter,
    backend: Shared,
    mask: Annotated[bool, Query(description="Whether it is a mask, and checked as one.")] = False,
) -> Response:
    """Equal pictures are stored once, and a picture that is sent again is kept as long as a new one."""
    if pictures.is_form(request):
        raise RefusedError(
            415,
            "The body is a form: send one picture's bytes as the body, by curl with `--data-binary @FILE`.",
        )
    name = "mask" if mask else "image"
    items, given = await pictures.take(backend, caller, [{name: await request.body()}], is_list=False)
    await pictures.store(backend, caller, given)
    return as_json(_answer(items[0][name]), 201)


def _answer(reference: str) -> dict[str, Any]:
    found = InputReference.parse(reference)
    return {"reference": reference, "width": found.width, "height": found.height}
