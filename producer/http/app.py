"""The app: all routes, one way to answer errors, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import re
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from producer.http import (
    a1111,
    activity_events,
    events,
    fleet,
    inputs,
    jobs,
    openai,
    page,
    problems,
    run_gallery,
    runs,
    schema,
    small_images,
    usage,
)
from producer.http.auth import Authentication, Shared
from producer.http.backend import Backend
from producer.http.guard import UPLOADS
from producer.http.problems import InvalidJobsError, RefusedError
from worker.contract.errors import SmallcatError
from worker.contract.explain import short
from worker.contract.limits import limits_of, requirement
from worker.contract.settings import ServerSettings

_DESCRIPTION = """\
Prompts in, pictures in S3 out. A job is submitted, queued in Redis and rendered by a worker.

Keys are made with `smallcat keys add NAME` and sent as `Authorization: Bearer KEY`.
"""

health = APIRouter(tags=["health"])


@health.get("/healthz", summary="Whether the server runs")
async def is_alive() -> dict[str, str]:
    """Always `ok`; asks nothing of Redis."""
    return {"status": "ok"}


@health.get(
    "/readyz",
    summary="Whether the server can take jobs",
    responses={503: {"description": "Redis is away, or the server is about to end."}},
)
async def is_ready(backend: Shared) -> dict[str, str]:
    """`ok` while Redis answers and the server is not about to end."""
    if backend.draining.is_set():
        raise RefusedError(503, "The server is about to end: use another one.", headers={"Retry-After": "1"})
    await backend.run(backend.session.redis.ping)
    return {"status": "ok"}


def make_app(
    settings: ServerSettings, *, is_open: bool = False, beside: AbstractContextManager[None] | None = None
) -> FastAPI:
    """The app. `is_open`: everybody may do everything, without a key. `beside` runs as long as the app."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend = Backend(settings)
        app.state.backend = backend
        app.state.authentication = Authentication(backend, is_open=is_open)
        await backend.find_runs()
        if beside is not None:
            beside.__enter__()
        yield
        await backend.close()
        if beside is not None:
            await asyncio.to_thread(beside.__exit__, None, None, None)

    app = FastAPI(
        title="smallcat",
        version=version("smallcat"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        # The pages load scripts of other hosts. The document is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    for router in (
        *(jobs.router, events.router, small_images.router, inputs.router),
        *(runs.router, run_gallery.router, fleet.router, usage.router),
    ):
        app.include_router(router, dependencies=[Depends(_refuse_unknown_parameters)])
    for router in (openai.router, a1111.router, activity_events.router, page.router, health):
        app.include_router(router)
    for kind in (
        SmallcatError,
        RefusedError,
        InvalidJobsError,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, _answer)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


async def _answer(request: Request, error: Exception) -> Response:
    """The answer to a request that failed."""
    ours, path = _as_ours(request, error), request.url.path
    if path.startswith(a1111.PATH):
        return a1111.answer(ours)
    return openai.answer(ours) if path.startswith(openai.PATHS) else problems.answer(ours)


def _as_ours(request: Request, error: Exception) -> Exception:
    """FastAPI's and Starlette's errors as `RefusedError`."""
    if isinstance(error, RequestValidationError):
        limits = _limits_at(request)
        return RefusedError(422, " ".join(_sentence(each, limits) for each in error.errors()))
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed(request)
        detail = {
            404: f"There is no {short(request.url.path)}: /openapi.json has all paths.",
            405: f"{request.method} is not for this path: use {headers.get('Allow')}.",
        }
        text = detail.get(error.status_code, str(error.detail))
        return RefusedError(error.status_code, text, headers=headers)
    return error


def _refuse_unknown_parameters(request: Request) -> None:
    """Raise `RefusedError` for a parameter that a route of our own does not have, and so would leave out.

    An upload's are job fields as well, and are looked at where it is read.
    """
    if request.method == "POST" and request.url.path in UPLOADS:
        return
    operation = _document(request.app)["paths"][request.scope["route"].path][request.method.lower()]
    known = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
    for name in request.query_params:
        if name not in known:
            near = difflib.get_close_matches(name[:100], known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}."
            raise RefusedError(422, f"There is no parameter {short(name)}: {hint}")


def _allowed(request: Request) -> str:
    """The methods of a path, of all its routes."""
    methods: set[str] = set()
    for pattern, operations in _document(request.app)["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), request.url.path):
            methods |= {name.upper() for name in operations}
    return ", ".join(sorted(methods)) or "GET, POST"


def _limits_at(request: Request) -> dict[str, str]:
    """The limits of the parameters of a request's route, by their names."""
    known = getattr(getattr(request.scope.get("route"), "dependant", None), "query_params", ())
    return {each.alias: limits_of(each.field_info.metadata) for each in known}


def _sentence(finding: Any, limits: dict[str, str]) -> str:
    """A finding about a parameter, whose `limits` are known by its name."""
    *where, name = map(str, finding["loc"])
    subject = f"The {' '.join(where).replace('query', 'parameter')} {name}"
    if finding["type"] == "missing":
        return f"{subject} is missing: send it."
    # Pydantic says "Input should be ...", "String should match ..." and the like.
    said = str(finding["msg"]).partition(", unable to")[0]
    rule = requirement({**finding, "msg": said}, limits.get(name, ""))
    limit = re.sub(r"^\w+ should ", "it must ", rule) if " should " in rule else f"it must be {rule}"
    return f"{subject} is {short(finding.get('input'))}: {limit}."


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components |= schema.schemas()
        for path in document["paths"].values():
            for operation in path.values():
                _put_right(operation)
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _put_right(operation: dict[str, Any]) -> None:
    """FastAPI's own description of a 422 is of another form than our answers."""
    found = operation["responses"].get("422", {}).get("content", {})
    if "application/json" in found:
        found.pop("application/json")
        found[problems.MEDIA_TYPE] = {"schema": schema.reference("Problem")}
