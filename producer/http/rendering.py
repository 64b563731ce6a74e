"""Requests that wait for their pictures, as OpenAI's API and AUTOMATIC1111's have them.

Whoever hangs up gets no picture any more, so his jobs are given up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from producer.client import JobHandle
from producer.client.job_result import JobResult
from producer.http.backend import Backend
from producer.http.caller import Caller
from producer.http.problems import RETRY_S, RefusedError
from producer.http.submitting import send
from producer.ingest.message_templates import TemplatedJob
from worker.contract.errors import JobCancelledError, SmallcatError


async def render(
    request: Request, backend: Backend, caller: Caller, jobs: Sequence[TemplatedJob]
) -> list[JobResult | None]:
    """Submit jobs and wait for their results; None for one that was interrupted.

    Raises the first job's own error, `RefusedError` (503) where no worker serves them, `QueueError`.
    """
    await _require_worker(backend, jobs)
    handles = await send(backend, caller, jobs)
    with backend.waiting.noted(caller, handles):
        waits = [asyncio.ensure_future(_result(handle)) for handle in handles]
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            whole = asyncio.gather(*waits)
            both: set[asyncio.Future[Any]] = {whole, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                whole.cancel()
                raise RefusedError(499, "The client has hung up.", code="HungUp")
            return whole.result()
        except Exception:
            await backend.run(_give_up, handles)
            raise
        finally:
            for each in (gone, *waits):
                each.cancel()
            await asyncio.gather(gone, *waits, return_exceptions=True)


async def _result(handle: JobHandle) -> JobResult | None:
    try:
        return await handle.aresult()
    except JobCancelledError:
        return None


async def _hung_up(request: Request) -> None:
    """Return when the client is gone. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _give_up(handles: Sequence[JobHandle]) -> None:
    for each in handles:
        with contextlib.suppress(SmallcatError):
            each.cancel()


async def _require_worker(backend: Backend, jobs: Sequence[TemplatedJob]) -> None:
    """Raise `RefusedError` where nobody would take the jobs: the request would wait without end."""
    fleet = backend.session.fleet
    for queue, version in {(job.route.queue, job.version) for job in jobs}:
        if not await backend.run(lambda q=queue, v=version: fleet.serving(q, version=v)):
            model = next(job.shape["model"] for job in jobs if job.route.queue == queue)
            raise RefusedError(
                503,
                f'No worker serves the model "{model}" now: start one, or submit the job to /v1/jobs, '
                "where it waits for one.",
                code="NoWorker",
                headers={"Retry-After": str(RETRY_S)},
            )
