"""Our own API for runs of prompt files: upload a file, and follow what becomes of it."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from producer.http import schema
from producer.http.auth import Reader, Shared, Submitter
from producer.http.backend import Backend
from producer.http.caller import Caller
from producer.http.jobs import as_json
from producer.http.limits import with_priority
from producer.http.problems import RefusedError
from producer.http.run_slots import MAX_RUNS, MAX_RUNS_OF_ONE
from producer.http.run_store import Upload
from producer.ingest.runs import RunInfo, cancel_run, find_run
from producer.ingest.types import FILE_PRIORITY
from producer.prompts.entries import LineError
from producer.prompts.fields import near_miss
from producer.prompts.sources import FORMATS
from producer.prompts.values import NOT_GIVEN, value_in_call
from worker.contract.errors import InvalidJobError, PromptFileError, UnknownJobError
from worker.contract.explain import short
from worker.contract.job import WRITTEN_FIELDS
from worker.contract.message import RUN_NAME
from worker.contract.webhook import MAX_WEBHOOK, hook_of

router = APIRouter(tags=["runs"])

_RUN: Final = {
    "type": "object",
    "title": "Run",
    "required": ["run", "state", "sent", "done", "failed", "cancelled", "rejected", "links"],
    "properties": {
        "run": {"type": "string", "pattern": f"^{RUN_NAME}$"},
        "state": {"enum": ["waiting", "feeding", "stopped", "finished", "cancelled", "failed"]},
        "created": {"type": ["integer", "null"]},
        "files": {"type": "array", "items": {"type": "string"}},
        **{name: {"type": "integer"} for name in ("sent", "done", "failed", "cancelled", "rejected")},
        "waiting": {"type": "integer", "description": "Jobs that wait for the pictures of others."},
        "total": {"type": ["integer", "null"]},
        "error": {"type": "string", "description": "Why it cannot go on."},
        "notices": {"type": "array", "items": {"type": "string"}},
        "links": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
#: The parameters that are no job fields.
_OWN: Final = (
    *("name", "format", "images", "seed_start", "grid", "sample", "literal", "extra", "strict", "manifest"),
    *("webhook", "webhook_jobs"),
)


@router.post(
    "/v1/runs",
    status_code=202,
    summary="Upload a prompt file",
    openapi_extra=schema.file_body(
        "The file as it is: txt, csv, tsv, jsonl or parquet; plain, gzip or zstd."
    ),
    responses=schema.answers(202, _RUN, 400, 413, 422),
)
async def upload_file(
    request: Request,
    caller: Submitter,
    backend: Shared,
    name: Annotated[str, Query(description="The file's name; its ending tells the format.")] = "prompts.txt",
    format: Annotated[str, Query(description="One of txt, csv, tsv, jsonl, parquet.")] = "",  # noqa: A002
    images: Annotated[int, Query(ge=1, le=1_000_000, description="Seeds for each prompt.")] = 1,
    seed_start: Annotated[int | None, Query(ge=0)] = None,
    # Not in the document: which texts are axes cannot be said there.
    grid: Annotated[list[str] | None, Query(include_in_schema=False)] = None,
    sample: Annotated[int | None, Query(ge=1, le=1_000_000, description="Variants of a line.")] = None,
    literal: bool = False,
    extra: bool = False,
    strict: bool = False,
    manifest: Literal["jsonl", "csv"] = "jsonl",
    webhook: Annotated[
        str | None,
        Query(max_length=MAX_WEBHOOK, description="Address of https that is told when the run is over."),
    ] = None,
    webhook_jobs: Annotated[bool, Query(description="Whether it is told of each job, too.")] = False,
) -> Response:
    """Render each line of a file once. The same file with the same parameters is the same run.

    Job fields are parameters, too, for lines that do not set them.
    """
    upload = Upload(
        *(_file_name(name), _format(format), images, seed_start, tuple(grid or ()), sample, literal, extra),
        strict,
        manifest,
        with_priority(caller.limits, _job_fields(request), FILE_PRIORITY),
        caller.owner,
        caller.limits.model_dump(mode="json") if caller.limits else None,
        hook_of(webhook, backend.settings.webhook_hosts, caller.tenant),
        webhook_jobs,
    )
    if webhook_jobs and webhook is None:
        raise PromptFileError("webhook_jobs is for a webhook: give its address with webhook.")
    await backend.limits.admit_run(caller, upload.fields)
    if backend.runs.is_full(caller.tenant_mark):
        raise RefusedError(
            503,
            f"So many runs wait that no further one is taken, of {MAX_RUNS:,} in all and {MAX_RUNS_OF_ONE:,} "
            "of a tenant: try again when some have ended, or cancel some.",
            code="Overloaded",
            headers={"Retry-After": "60"},
        )
    with backend.runs.uploading() as folder:
        file = folder / f"prompts{''.join(PurePosixPath(upload.name).suffixes[-2:])[:20]}"
        await _receive(request, file)
        run = await run_in_threadpool(backend.runs.take, folder, file, upload, caller.mark)
    found = await backend.run(look, backend, run)
    return as_json(found, 202, {"Location": found["links"]["self"]})


@router.get(
    "/v1/runs",
    summary="Your runs",
    responses=schema.answers(
        200,
        {"type": "object", "required": ["runs"], "properties": {"runs": {"type": "array", "items": _RUN}}},
    ),
)
async def list_runs(caller: Reader, backend: Shared) -> Response:
    """The runs that this key has sent to this server."""

    def look_at_all() -> list[dict[str, Any]]:
        return [look(backend, run) for run in backend.runs.names(caller.mark)]

    return as_json({"runs": await backend.run(look_at_all)})


@router.get("/v1/runs/{run}", summary="Look at a run", responses=schema.answers(200, _RUN, 404))
async def get_run(run: str, caller: Reader, backend: Shared) -> Response:
    """Its state and counts, with links to its manifest and its rejected lines."""
    require_own(run, caller)
    return as_json(await backend.run(look, backend, run))


@router.delete("/v1/runs/{run}", summary="Cancel a run", responses=schema.answers(200, _RUN, 404))
async def delete_run(run: str, caller: Submitter, backend: Shared) -> Response:
    """Send no more of it, and drop what waits. Jobs that others want as well go on."""
    require_own(run, caller)
    await backend.run(cancel_run, backend.session.redis, backend.session.records, run)
    return as_json(await backend.run(look, backend, run))


@router.get(
    "/v1/runs/{run}/manifest",
    summary="What became of each job",
    responses=schema.answers(200, {"type": "string"}, 404, 409, media="application/x-ndjson"),
)
async def get_manifest(run: str, caller: Reader, backend: Shared) -> Response:
    """A line a job in the order of the file, as `smallcat ingest` writes it. 409 until the run is over."""
    require_own(run, caller)
    if (path := backend.runs.manifest(run)) is None:
        found = await backend.run(look, backend, run)
        raise RefusedError(
            409,
            f"The run {run} is {found['state']}: its manifest is written when all its jobs have ended.",
            code="NotDone",
            headers={"Retry-After": "10"},
        )
    return _file(path)


@router.get(
    "/v1/runs/{run}/rejected",
    summary="The lines that are no jobs",
    responses=schema.answers(200, {"type": "string"}, 404, media="application/x-ndjson"),
)
async def get_rejected(run: str, caller: Reader, backend: Shared) -> Response:
    """A line each, with its number, the field and the reason."""
    require_own(run, caller)
    if (path := backend.runs.rejected(run)) is None:
        await backend.run(look, backend, run)
        return Response("", media_type="application/x-ndjson")
    return _file(path)


def _file(path: Path) -> Response:
    kind = "text/csv; charset=utf-8" if path.suffix == ".csv" else "application/x-ndjson"
    return FileResponse(path, media_type=kind, headers={"X-Content-Type-Options": "nosniff"})


def look(backend: Backend, run: str) -> dict[str, Any]:
    """What is known of a run, in Redis and by this server. Raises `UnknownJobError`."""
    path, store = f"/v1/runs/{run}", backend.runs
    links = {"self": path} | {name: f"{path}/{name}" for name in ("manifest", "rejected", "gallery")}
    try:
        info = find_run(backend.session.redis, run)
    except UnknownJobError:
        if not store.knows(run):
            raise _unknown(run) from None
        info = RunInfo(run, "waiting", 0, (), 0, None, 0, 0, 0, 0, 0, None, None)
    error = store.error(run)
    state = info.state
    if error:
        state = "failed"
    elif state == "finished" and store.knows(run) and store.manifest(run) is None:
        state = "feeding"  # The manifest is being written.
    return {
        "run": run,
        "state": state,
        "created": info.created or None,
        "files": list(info.files),
        "sent": info.sent,
        "total": info.total,
        "done": info.done,
        "failed": info.failed,
        "cancelled": info.cancelled,
        "waiting": info.waiting,
        "rejected": info.rejected,
        "error": error,
        "notices": store.notices(run),
        "links": links,
    }


def _unknown(run: str) -> UnknownJobError:
    return UnknownJobError(f"There is no run {short(run)} of yours: `GET /v1/runs` has all.")


def require_own(run: str, caller: Caller) -> None:
    """Raise `UnknownJobError` for a run that is somebody else's."""
    if not re.fullmatch(RUN_NAME, run) or not caller.owns(run):
        raise _unknown(run)


async def _receive(request: Request, file: Path) -> None:
    """Write the body to a file, as it comes."""
    size = 0
    with file.open("wb") as target:
        try:
            async for piece in request.stream():
                size += len(piece)
                if piece:
                    await run_in_threadpool(target.write, piece)
        except ClientDisconnect:
            raise RefusedError(499, "The client has hung up.", code="HungUp") from None
    if not size:
        raise PromptFileError("The file is empty: send its bytes as the body.")


def _file_name(name: str) -> str:
    """The last part of a file's name. Raises `PromptFileError` for what is none."""
    last = name.replace("\\", "/").rpartition("/")[2]
    if not last.strip(". ") or len(last) > 200 or not last.isprintable():
        raise PromptFileError(f"name is {short(name)}: use a file's name such as prompts.csv.")
    return last


def _format(form: str) -> str:
    if form and form not in FORMATS:
        raise PromptFileError(f"format is {short(form)}: use one of {', '.join(FORMATS)}.")
    return form


def _job_fields(request: Request) -> dict[str, Any]:
    """The job fields among the parameters. Raises `InvalidJobError` for a name that is none."""
    found: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name in _OWN:
            continue
        if name not in WRITTEN_FIELDS or name == "prompt":
            hint = f"did you mean {near}?" if (near := near_miss(name)) else "/openapi.json has all."
            raise InvalidJobError(f"There is no parameter {short(name)}: {hint}")
        if name in found:
            raise InvalidJobError(f"{name} is given twice: keep one.")
        try:
            value = value_in_call(WRITTEN_FIELDS[name], text)
        except LineError as error:
            raise InvalidJobError(error.reason) from None
        if value is not NOT_GIVEN:
            found[name] = value
    return found
