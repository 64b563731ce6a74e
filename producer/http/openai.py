"""OpenAI's images API, for clients that have it: a request waits for its pictures.

Source: the openai package 3.57 (`types/image_generate_params.py`, `types/images_response.py`). Job fields
come beside OpenAI's own, as `extra_body`. A parameter that would change the picture there and means nothing
here is refused by its name.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from producer.client.job_result import JobResult
from producer.http.auth import Reader, Shared, Submitter
from producer.http.backend import Backend
from producer.http.caller import Caller
from producer.http.foreign_masks import is_transparent, openai_mask
from producer.http.jobs import as_json
from producer.http.models import allowed, served_models
from producer.http.pictures import fields_of, is_form, read_form
from producer.http.problems import RefusedError, headers_of, name_of, sentence_of, status_of
from producer.http.reading import read_json
from producer.http.rendering import render
from producer.http.submitting import check, numbered
from worker.contract.errors import InvalidJobError, JobError
from worker.contract.explain import short
from worker.contract.input_reference import ALPHA
from worker.contract.job import WRITTEN_FIELDS
from worker.contract.job_parameters import DEFAULT_MODEL

router = APIRouter(include_in_schema=False)

#: Where the routes are, by how their paths begin: errors have OpenAI's form there.
PATHS: Final = ("/v1/images", "/v1/models")
#: Pictures of one request, at most.
MAX_N: Final = 10
#: Seconds that links are valid; OpenAI's are for an hour.
LINK_S: Final = 3_600
#: Parameters that may have these values only, and what to do instead of the others.
_ONLY: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "quality": (("auto", "standard"), "ask for steps instead"),
    "style": ((), "say it in the prompt"),
    "background": (("auto", "opaque"), "leave it out"),
    "moderation": (("auto", "low"), "leave it out"),
    "output_compression": ((100,), "leave it out"),
    "stream": ((False,), "follow /v1/jobs/ID/events instead"),
    "partial_images": ((0,), "leave it out"),
    "complexity": ((), "leave it out"),
    "input_fidelity": ((), "leave it out"),
}
#: Parameters that say who asks, and change nothing.
_UNREAD: Final = ("user", "safety_identifier")
#: Job fields, and what is read as them; OpenAI's own of the same names are read apart.
_OURS: Final = frozenset(WRITTEN_FIELDS) - {"image", "mask", "size"}
_FORMATS: Final = ("png", "webp", "jpeg")


@router.post("/v1/images/generations")
async def generate(request: Request, caller: Submitter, backend: Shared) -> Response:
    """Pictures, in the order of their seeds."""
    body = await read_json(request)
    if not isinstance(body, dict):
        raise InvalidJobError(f"The body is {short(body)}: it must be an object such as {{'prompt': ...}}.")
    return await _render(request, caller, backend, body)


async def _render(request: Request, caller: Caller, backend: Backend, body: Mapping[str, Any]) -> Response:
    fields = {name: value for name, value in body.items() if value is not None}
    count, form = _number(fields), _form(fields)
    job = _job_fields(fields)
    await _require_model(backend, caller, job)
    jobs = await check(backend, caller, numbered(job, count), is_list=False)
    results = await render(request, backend, caller, jobs)
    if None in results:
        raise RefusedError(409, "The job was cancelled.", code="JobCancelledError")
    found = [each for each in results if each is not None]
    data = [await _image(backend, result, form) for result in found]
    first = found[0]
    return as_json(
        {
            "created": int(time.time()),
            "data": data,
            "size": f"{first.width}x{first.height}",
            "output_format": str(first.job.format),
        }
    )


@router.post("/v1/images/edits")
async def edit(request: Request, caller: Submitter, backend: Shared) -> Response:
    """Pictures that begin with one: all of it drawn anew, or the part where the mask is transparent."""
    if not is_form(request):
        raise RefusedError(415, "An edit is a form with files: send it as multipart/form-data.")
    body = _edit_fields(await read_form(request))
    async with backend.unpacking:
        body = await backend.run(_with_mask, body)
    return await _render(request, caller, backend, body)


def _edit_fields(parts: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The parameters of an edit by the parts of its form, where clients send the image as a list, too."""
    images = [(name, value) for name, value in parts if name in ("image", "image[]")]
    if len(images) != 1:
        raise InvalidJobError(f"image is {len(images)} pictures: a job begins with one.")
    numbers = {"n": int, "output_compression": int, "partial_images": int}
    found: dict[str, Any] = {}
    for name, value in parts:
        if name in ("image", "image[]"):
            found["image"] = value
        elif name in numbers and isinstance(value, str) and value.isascii() and value.isdigit():
            found[name] = int(value)
        elif name == "stream" and value in ("true", "false"):
            found[name] = value == "true"
        elif name in _OURS or name in found or "[" in name:
            found |= fields_of([(name, value)])
        else:
            found[name] = value
    return found


def _with_mask(body: dict[str, Any]) -> dict[str, Any]:
    """The same with the mask as ours is. Without one, a transparent image is its own, as for DALL-E 2."""
    image, mask = body["image"], body.get("mask")
    if not isinstance(image, bytes):
        raise InvalidJobError("image is a text: send it as a file of the form.")
    if isinstance(mask, bytes):
        return body | {"mask": openai_mask(mask)}
    if mask is None and is_transparent(image):
        return body | {"mask": ALPHA}
    return body


@router.get("/v1/models")
async def models(caller: Reader, backend: Shared) -> Response:
    """The models that live workers serve."""
    found = allowed(caller, await backend.run(served_models, backend.session.fleet))
    return as_json({"object": "list", "data": [_model(each.name, each.since) for each in found]})


@router.get("/v1/models/{name:path}")
async def model(name: str, caller: Reader, backend: Shared) -> Response:
    """One of them."""
    for each in allowed(caller, await backend.run(served_models, backend.session.fleet)):
        if each.name == name:
            return as_json(_model(each.name, each.since))
    raise _no_model(name)


def _model(name: str, since: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(since), "owned_by": "smallcat"}


def _number(fields: dict[str, Any]) -> int:
    number = fields.pop("n", 1)
    if type(number) is not int or not 1 <= number <= MAX_N:
        raise InvalidJobError(f"n is {short(number)}: it must be 1 to {MAX_N}.")
    return number


def _form(fields: dict[str, Any]) -> str:
    """`url`, `b64_json`, or empty for both: older clients expect the one, newer ones the other."""
    form = fields.pop("response_format", "")
    if form not in ("", "url", "b64_json"):
        raise InvalidJobError(f"response_format is {short(form)}: use url or b64_json.")
    return str(form)


def _job_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The job fields of a request. Raises `InvalidJobError` for what is not offered."""
    for name in _UNREAD:
        fields.pop(name, None)
    for name, (values, remedy) in _ONLY.items():
        if name in fields and (value := fields.pop(name)) not in values:
            raise InvalidJobError(f"{name} is {short(value)}, which is not offered: {remedy}.")
    if "output_format" in fields:
        fields["format"] = fields.pop("output_format")
        if fields["format"] not in _FORMATS:
            shown = short(fields["format"])
            raise InvalidJobError(f"output_format is {shown}: use one of {', '.join(_FORMATS)}.")
    size = fields.pop("size", "auto")
    if size != "auto":
        sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
        if sides is None:
            raise InvalidJobError(f"size is {short(size)}: write it as 512x512, or auto for the model's own.")
        fields |= {"width": int(sides[1]), "height": int(sides[2])}
    return fields


async def _require_model(backend: Backend, caller: Caller, fields: Mapping[str, Any]) -> None:
    """Raise `RefusedError` (404) for a model that nobody serves: its request would wait without end."""
    name = fields.get("model", DEFAULT_MODEL)
    if not isinstance(name, str) or name == DEFAULT_MODEL:
        return
    found = allowed(caller, await backend.run(served_models, backend.session.fleet))
    if name not in [each.name for each in found]:
        raise _no_model(name)


def _no_model(name: str) -> RefusedError:
    return RefusedError(
        404,
        f"There is no model {short(name)}: /v1/models has those that are served, or leave model out.",
        code="model_not_found",
    )


async def _image(backend: Backend, result: JobResult, form: str) -> dict[str, Any]:
    image: dict[str, Any] = {"id": result.id, "seed": result.seed}
    if result.warnings:
        image["warnings"] = list(result.warnings)
    if form != "b64_json":
        image["url"] = await backend.run(result.url, LINK_S)
    if form != "url":
        image["b64_json"] = base64.b64encode(await backend.run(result.data)).decode()
    return image


_KINDS: Final = {
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("insufficient_permissions", "insufficient_permissions"),
    404: ("invalid_request_error", None),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}


def answer(error: Exception) -> Response:
    """The answer that says `error`, in OpenAI's form."""
    status = status_of(error)
    if status == 422:
        status = 400  # OpenAI's own for wrong values.
    if isinstance(error, JobError):
        status = 500
    kind, code = _KINDS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    if isinstance(error, RefusedError) and status == 404:
        code = error.code or None
    param = re.match(r'(?:There is no job field ")?([a-z]\w*)(?:"| (?:is|has|holds) )', sentence_of(error))
    body = {
        "message": sentence_of(error),
        "type": kind,
        "param": param[1] if param and status == 400 else None,
        "code": code or (name_of(error) if status >= 500 else None),
    }
    return Response(json.dumps({"error": body}), status, headers_of(error), "application/json")
