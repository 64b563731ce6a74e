"""Our own API for jobs: submit, look at, give up, and fetch the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from producer.client import JobHandle
from producer.client.job_result import JobResult
from producer.http import schema
from producer.http.auth import Reader, Shared, Submitter
from producer.http.backend import Backend
from producer.http.caller import Caller
from producer.http.idempotency import Once
from producer.http.pictures import fields_of, is_form, read_form
from producer.http.problems import RETRY_S, RefusedError, status_of
from producer.http.reading import read_json
from producer.http.submitting import check, send
from worker.contract.choices import ImageFormat
from worker.contract.errors import UnknownJobError
from worker.contract.record import State
from worker.state.hashes import JOB_ID, unknown
from worker.state.submissions import Submissions

router = APIRouter(tags=["jobs"])

#: Seconds that a request for a picture may wait for it, at most.
MAX_WAIT_S: Final = 600
#: The media types of pictures.
MEDIA: Final = {each: f"image/{each}" for each in ImageFormat}
Mine = Annotated[
    str, Query(pattern=f"^({schema.SUBMISSION})?$", description="The submission; not given: any of yours.")
]
_BODY: Final = schema.json_body(
    {
        "oneOf": [
            schema.reference("Job"),
            {"type": "array", "items": schema.reference("Job"), "minItems": 1, "maxItems": schema.MAX_JOBS},
        ]
    },
    {
        "one": {"summary": "One job", "value": schema.EXAMPLE},
        "several": {"summary": "Several", "value": [schema.EXAMPLE, {"prompt": "a rocket"}]},
    },
)


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer of JSON."""
    return Response(json.dumps(value), status, headers, "application/json")


def links(job_id: str, submission: str) -> dict[str, str]:
    """The paths of a submission."""
    mine = f"?submission={submission}" if submission else ""
    path = f"/v1/jobs/{job_id}"
    return {"self": path + mine, "events": f"{path}/events{mine}", "image": f"{path}/image{mine}"}


@router.post(
    "/v1/jobs",
    status_code=202,
    summary="Submit one job, or up to 1,000",
    openapi_extra=schema.with_form(_BODY),
    responses=schema.answers(
        202,
        {"anyOf": [schema.reference("Submitted"), schema.reference("SubmittedList")]},
        400,
        409,
        413,
        415,
        422,
    ),
)
async def submit_jobs(
    request: Request,
    caller: Submitter,
    backend: Shared,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="A request that is sent again with the same one is done once.",
            json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": r"^[\x21\x23-\x7e][\x21-\x7e]*$"},
        ),
    ] = None,
) -> Response:
    """Enqueue jobs and return at once. Of a list with a wrong job nothing is sent: `errors` names each."""
    is_in_form = is_form(request)
    body = fields_of(await read_form(request)) if is_in_form else await read_json(request, or_form=True)
    once = None if idempotency_key is None else Once.of(caller, idempotency_key, await request.body())
    if once is None:
        return _accepted(await _submit(backend, caller, body, None))
    redis = backend.session.redis
    answer = await backend.run(once.begin, redis)
    if answer is None:
        try:
            answer = await _submit(backend, caller, body, once)
        except BaseException as error:
            # What was refused at the door was not begun; what was cut off goes on with the same key.
            is_refused = isinstance(error, Exception) and status_of(error) < 500
            await backend.run(once.forget if is_refused else once.give_up, redis)
            raise
        await backend.run(once.finish, redis, answer)
    return _accepted(answer)


async def _submit(backend: Backend, caller: Caller, body: Any, once: Once | None) -> Any:
    """What is answered: for each job its id, its submission and its seed; a list for a list."""
    is_list = isinstance(body, list)
    items: Sequence[Any] = body if is_list else [body]
    if not 1 <= len(items) <= schema.MAX_JOBS:
        raise RefusedError(
            422, f"The list has {len(items):,} jobs: send 1 to {schema.MAX_JOBS:,}, or a file to /v1/runs."
        )
    numbers = range(len(items))
    seeds = [once.seed(number) for number in numbers] if once else None
    jobs = await check(backend, caller, items, seeds, is_list=is_list)
    ids = [once.submission(number) for number in numbers] if once else None
    handles = await send(backend, caller, jobs, ids, once.note if once else "")
    found = [[handle.id, handle.submission, job.seed] for handle, job in zip(handles, jobs, strict=True)]
    return found if is_list else found[0]


def _accepted(answer: Any) -> Response:
    if isinstance(answer[0], list):
        return as_json({"jobs": [_submitted(*each) for each in answer]}, 202)
    made = _submitted(*answer)
    return as_json(made, 202, {"Location": made["links"]["self"]})


def _submitted(job_id: str, submission: str, seed: int) -> dict[str, Any]:
    made = {"id": job_id, "submission": submission, "state": "queued", "seed": seed}
    return {**made, "links": links(job_id, submission)}


@router.get(
    "/v1/jobs",
    summary="The latest jobs",
    responses=schema.answers(
        200,
        {
            "type": "object",
            "required": ["jobs"],
            "properties": {"jobs": {"type": "array", "items": schema.reference("JobView")}},
        },
        422,
    ),
)
async def latest_jobs(
    caller: Reader, backend: Shared, limit: Annotated[int, Query(ge=1, le=1_000)] = 20
) -> Response:
    """The jobs that were submitted last, the latest first, but for those of prompt files.

    A tenant's key gets those of its tenant.
    """
    whose = None if caller.sees_all else caller.tenant or caller.owner
    records = await backend.run(backend.session.latest, limit, whose, caller.owner)
    return as_json({"jobs": [view(JobResult.of(record), "", caller) for record in records]})


@router.get(
    "/v1/jobs/{job_id}",
    summary="Look at a job",
    responses=schema.answers(200, schema.reference("JobView"), 404, 422),
)
async def get_job(job_id: str, caller: Reader, backend: Shared, submission: Mine = "") -> Response:
    """The job's record, with what is your submission's own."""

    def look() -> dict[str, Any]:
        handle, record = own_record(backend, caller, job_id, submission)
        note = "" if record.state.is_final else handle.progress().note
        return view(record, handle.submission, caller) | {"note": note}

    return as_json(await backend.run(look))


@router.delete(
    "/v1/jobs/{job_id}",
    summary="Give a job up",
    responses=schema.answers(200, schema.reference("JobState"), 404, 422),
)
async def give_up(job_id: str, caller: Submitter, backend: Shared, submission: Mine = "") -> Response:
    """Give up your submission, or all of yours. Others who want the job get it still.

    A running job stops at its next step, when nobody wants it any more. The scope `admin` cancels the job of
    others for all.
    """

    def cancel() -> State:
        if submission:
            return own_handle(backend, caller, job_id, submission).cancel()
        mine = own_submissions(backend, caller, job_id)
        if not mine:
            _, record = own_record(backend, caller, job_id)
            if record.state.is_final:
                return record.state
            if not caller.may("admin"):
                raise RefusedError(
                    403,
                    f"No submission of job {job_id} is yours: name it with ?submission=, or use an admin's "
                    "key.",
                )
        for_all = mine or _submissions_for_all(backend, caller, job_id)
        return [JobHandle(job_id, each, caller.owner).cancel() for each in for_all][-1]

    require_id(job_id)
    return as_json({"id": job_id, "state": str(await backend.run(cancel))})


@router.get(
    "/v1/jobs/{job_id}/image",
    summary="Fetch the picture",
    response_class=RedirectResponse,
    status_code=307,
    responses={
        **schema.answers(307, None, 404, 409, 422),
        200: {
            "description": "The picture's file, with redirect=false.",
            "content": {
                media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA.values()
            },
        },
    },
)
async def get_image(
    job_id: str,
    caller: Reader,
    backend: Shared,
    submission: Mine = "",
    redirect: Annotated[bool, Query(description="To a link to the bucket; false: the file itself.")] = True,
    wait: Annotated[int, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the picture.")] = 0,
    expires_s: Annotated[int, Query(ge=1, le=604_800, description="Seconds that the link is valid.")] = 3_600,
) -> Response:
    """The picture, as a redirect to a presigned link or as it is. 409 while it is not there."""
    handle, record = await backend.run(own_record, backend, caller, job_id, submission)
    result = await finished(backend, handle, record, wait)
    if redirect:
        return RedirectResponse(await backend.run(result.url, expires_s), 307, {"Cache-Control": "no-store"})
    name = f"{job_id}.{result.job.format}"
    return Response(
        await backend.run(result.data),
        headers={"Content-Disposition": f'inline; filename="{name}"', "X-Content-Type-Options": "nosniff"},
        media_type=MEDIA[result.job.format],
    )


async def finished(backend: Backend, handle: JobHandle, record: JobResult, wait_s: float) -> JobResult:
    """The job's result. Raises the job's error; `RefusedError` (409) where it is not done within `wait_s`."""
    if not record.state.is_final and wait_s:
        try:
            return await handle.aresult(wait_s)
        except TimeoutError:
            record = await backend.run(handle.record)
    if not record.state.is_final:
        raise RefusedError(
            409,
            f"Job {handle.id} is {record.state}: it has no picture yet. Add ?wait=SECONDS, or follow it.",
            code="NotDone",
            headers={"Retry-After": str(RETRY_S)},
        )
    record.raise_for_state()
    return record


def require_id(job_id: str) -> None:
    """Raise `UnknownJobError` for what is no job's id."""
    if not JOB_ID.fullmatch(job_id):
        raise UnknownJobError("There is no such job: an id has 32 hexadecimal digits in lower case.")


def own_submissions(backend: Backend, caller: Caller, job_id: str) -> list[str]:
    """The submissions of a job that are `caller`'s and that were not given up."""
    found = Submissions(backend.session.redis, 1).of(job_id)
    return sorted(each for each in found if each.startswith(caller.mark))


def _submissions_for_all(backend: Backend, caller: Caller, job_id: str) -> list[str]:
    """What an admin gives up: the job, or of one that tenants share his tenant's submissions."""
    if not caller.shares:
        return [""]
    found = Submissions(backend.session.redis, 1).of(job_id)
    return [each for each in found if each.startswith(caller.tenant_mark)]


def own_handle(backend: Backend, caller: Caller, job_id: str, submission: str = "") -> JobHandle:
    """The handle of a caller's own submission, or of the job where none is known.

    Raises `UnknownJobError` for a submission that is somebody else's, that has expired, or that there never
    was.
    """
    require_id(job_id)
    if submission and not caller.owns(submission):
        raise unknown(job_id)
    if not submission:
        submission = next(iter(own_submissions(backend, caller, job_id)), "")
    elif not (
        # Its first digits alone make it nobody's own.
        backend.session.records.submission(job_id, submission)[0]
        or submission in Submissions(backend.session.redis, 1).of(job_id)
    ):
        raise unknown(job_id, submission)
    return JobHandle(job_id, submission, caller.owner)


def own_record(
    backend: Backend, caller: Caller, job_id: str, submission: str = ""
) -> tuple[JobHandle, JobResult]:
    """The handle as `own_handle` has it, and its record.

    Raises `UnknownJobError`, also for a job of another tenant: in the words for one that is not there.
    """
    handle = own_handle(backend, caller, job_id, submission)
    record = handle.record()
    is_seen = caller.sees_all or record.job.tenant == caller.owner
    if is_seen and caller.shares and not handle.submission:
        # Other tenants' jobs have the same owner.
        is_seen = bool(_submissions_for_all(backend, caller, job_id))
    if not is_seen:
        raise unknown(job_id)
    return handle, record


def view(record: JobResult, submission: str, caller: Caller) -> dict[str, Any]:
    """What a caller sees of a job: without the metadata and the priority of others' submissions."""
    if not submission and not caller.may("admin"):
        record = record.with_own({})
    values = record.model_dump(mode="json", exclude={"runs"})
    return {**values, "submission": submission, "links": links(record.id, submission)}
