"""What goes on, as server-sent events: the latest jobs, the queues and the workers. The page's own stream.

    event: jobs      data: {"jobs": [a row a job that is new or has changed], "gone": [ids]}
    event: fleet     data: {"workers": [...], "queues": [...], "waiting": 12, "running": 4, ...}
    event: trouble   data: {"text": "Redis is away..."}, empty when it is over

The first events have everything. A row is as the gallery's pages have it, all of its values texts, with the
state, the steps and the caller's own submission beside them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from producer.client.job_result import JobResult
from producer.gallery.rows import row_of_record
from producer.http.activity import Activity, Audience, SeenJob, Watcher
from producer.http.auth import Reader, Rights, Shared
from producer.http.backend import Backend
from producer.http.caller import Caller
from producer.http.events import until_changed
from producer.http.jobs import view
from producer.http.models import models_of

router = APIRouter(include_in_schema=False)

#: Milliseconds after which a browser comes back when the stream was cut off.
_RETRY_MS: Final = 2_000


@router.get("/v1/activity")
async def activity(request: Request, caller: Reader, backend: Shared) -> Response:
    """Server-sent events until the client hangs up, or may not read any longer."""
    return backend.streams.open(caller, _events(backend, caller, Rights(request, caller)))


async def _events(backend: Backend, caller: Caller, rights: Rights) -> AsyncIterator[str]:
    yield f"retry: {_RETRY_MS}\n\n"
    sent = _Sent(caller)
    tenant = None if caller.sees_all else caller.tenant or caller.owner
    audience = Audience(tenant, caller.owner, models_of(caller))
    with backend.watching.watch(audience) as watcher:
        while not backend.draining.is_set():
            is_changed = await until_changed(backend, watcher.changed)
            if await rights.have_ended():
                return
            if not is_changed:
                yield ": still here\n\n"
                continue
            for event in sent.news(watcher):
                yield event


class _Sent:
    """What one client has been sent."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._jobs: dict[str, SeenJob] | None = None
        self._fleet: Mapping[str, Any] | None = None
        self._trouble = ""
        #: The number of the activity that was sent last.
        self._number = 0

    def news(self, watcher: Watcher) -> list[str]:
        """The events that are due."""
        seen, caller = watcher.seen, self._caller
        if seen is None or seen.number == self._number:
            return []
        # What this client has, which is the same object for those that go in step; and all that `row` and
        # `may_see` depend on. Equal numbers would not do: who came during an outage has less.
        has = self._jobs, self._fleet
        key = (
            *(*map(id, has), self._trouble),
            *(caller.mark, caller.scopes, caller.owner, caller.shares),
        )
        if (known := seen.events.get(key)) is None:
            events = self._compose(seen)
            # `has` is kept, so that no other object gets its id.
            seen.events[key] = known = has, events, self._jobs, self._fleet, self._trouble
        _, events, self._jobs, self._fleet, self._trouble = known
        self._number = seen.number
        return list(events)

    def _compose(self, seen: Activity) -> list[str]:
        """The events that lead from what was sent to `seen`."""
        found: list[str] = []
        if seen.trouble != self._trouble:
            self._trouble = seen.trouble
            found.append(_text("trouble", {"text": seen.trouble}))
        if not seen.fleet:  # Nothing could be read.
            return found
        before = self._jobs or {}
        jobs = {name: job for name, job in seen.jobs.items() if may_see(self._caller, job)}
        new = [row(job, self._caller) for name, job in jobs.items() if before.get(name) is not job]
        gone = [name for name in before if name not in jobs]
        if new or gone or self._jobs is None:
            found.append(_text("jobs", {"jobs": new, "gone": gone}))
        self._jobs = jobs
        if seen.fleet != self._fleet:
            self._fleet = seen.fleet
            found.append(_text("fleet", seen.fleet))
        return found


def may_see(caller: Caller, job: SeenJob) -> bool:
    """Whether the job is shown to this caller: as `own_record` has it."""
    if caller.sees_all:
        return True
    if job.record.job.tenant != caller.owner:
        return False
    # Other tenants' jobs have the same owner.
    return not caller.shares or any(each.startswith(caller.tenant_mark) for each in job.submissions)


def row(job: SeenJob, caller: Caller) -> dict[str, Any]:
    """The job as this caller sees it."""
    record = JobResult.of(job.record)
    submission = next((each for each in job.submissions if each.startswith(caller.mark)), "")
    values = view(record, "", caller)
    return row_of_record(values) | {
        "at": job.at,
        "step": record.step,
        "of": record.steps,
        "submission": submission,
        "may_cancel": bool(submission) or caller.may("admin"),
        "is_of_run": bool(record.runs),
        "format": str(record.job.format),
    }


def _text(event: str, values: Any) -> str:
    return f"event: {event}\ndata: {json.dumps(values)}\n\n"
