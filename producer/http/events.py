"""A job's events as server-sent events: its place in the queue, its steps, and how it ended.

    event: waiting    data: {"id": ..., "state": "waiting"}: for the pictures of other jobs
    event: queued     data: {"id": ..., "state": "queued", "ahead": 12}
    event: running    data: {"id": ..., "state": "running", "step": 7, "steps": 20}
    event: done       data: the job, as GET /v1/jobs/{id} has it; the stream ends. Likewise failed, cancelled

`ahead` is how many messages workers may fetch before the job's own, at most. An event is the state at that
moment: whoever reads slowly gets fewer of them. A client that comes back with Last-Event-ID gets what is new;
one that has seen the end gets 204, at which browsers stop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from producer.client import JobHandle
from producer.client.job_result import JobResult
from producer.http import schema
from producer.http.auth import BELIEVED_S, Reader, Rights, Shared
from producer.http.backend import Backend
from producer.http.caller import Caller
from producer.http.jobs import Mine, own_record, view
from worker.contract.errors import SmallcatError
from worker.state.following import Seen

router = APIRouter(tags=["jobs"])

#: Seconds of silence after which a comment is sent: proxies close what is silent, a client that is gone is
#: noticed, and so is one that may not read any longer.
BEAT_S: Final = BELIEVED_S
#: Milliseconds after which a client comes back when the stream was cut off.
_RETRY_MS: Final = 2_000


@router.get(
    "/v1/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=StreamingResponse,
    responses={
        **schema.answers(200, {}, 404, 422, media="text/event-stream"),
        204: {"description": "Last-Event-ID is the last event there is."},
    },
)
async def job_events(
    job_id: str,
    request: Request,
    caller: Reader,
    backend: Shared,
    submission: Mine = "",
    last_event_id: Annotated[str, Header(max_length=100)] = "",
) -> Response:
    """Server-sent events until the job has ended."""
    handle, record = await backend.run(own_record, backend, caller, job_id, submission)
    if record.state.is_final and last_event_id == str(record.state):
        return Response(status_code=204)
    events = _events(backend, caller, Rights(request, caller), handle, record, last_event_id)
    return backend.streams.open(caller, events)


async def _events(
    backend: Backend, caller: Caller, rights: Rights, handle: JobHandle, record: JobResult, last: str
) -> AsyncIterator[str]:
    """The events as text. Ends with the job, the caller's rights and the server, and when Redis is lost."""
    yield f"retry: {_RETRY_MS}\n\n"
    if record.state.is_final:
        yield _last_event(record, handle.submission, caller)
        return
    priority, tenant = record.job.priority, record.job.tenant
    with backend.following.follow(handle.id, handle.submission, priority, tenant) as follower:
        while not backend.draining.is_set():
            is_changed = await until_changed(backend, follower.changed)
            if await rights.have_ended():
                return
            if not is_changed:
                yield ": still here\n\n"
                continue
            seen = follower.seen
            if seen is None or follower.error is not None:
                return
            if seen.is_wanted and seen.state in ("waiting", "queued", "running"):
                name, event = _event(handle.id, seen)
                if name != last:
                    last = name
                    yield event
                continue
            try:
                record = await backend.run(handle.record)
            except SmallcatError:
                return  # The client connects again, and then gets the error.
            if record.state.is_final:
                yield _last_event(record, handle.submission, caller)
                return


async def until_changed(backend: Backend, changed: asyncio.Event) -> bool:
    """Wait for something new, or the server's end; False after `BEAT_S` seconds of nothing."""
    waits = [
        asyncio.ensure_future(changed.wait()),
        asyncio.ensure_future(backend.draining.wait()),
    ]
    try:
        done, _ = await asyncio.wait(waits, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()
            with suppress(asyncio.CancelledError):
                await each
    changed.clear()
    return bool(done)


def _event(job_id: str, seen: Seen) -> tuple[str, str]:
    """The id of an event, and the event."""
    values: dict[str, Any] = {"id": job_id, "state": seen.state}
    if seen.state == "queued":
        values["ahead"], name = seen.ahead, f"queued-{seen.ahead}"
    elif seen.state == "waiting":
        name = "waiting"
    else:
        values |= {"step": seen.step, "steps": seen.steps}
        name = f"running-{seen.step}"
    return name, _text(name, seen.state, values)


def _last_event(record: JobResult, submission: str, caller: Caller) -> str:
    return _text(str(record.state), str(record.state), view(record, submission, caller))


def _text(name: str, event: str, values: Any) -> str:
    return f"id: {name}\nevent: {event}\ndata: {json.dumps(values)}\n\n"
