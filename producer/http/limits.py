"""What a tenant may send and submit: all ways of submitting go through here.

    403   what the tenant may never ask for: a priority, a format, a model, a size, or too much at once
    404   a model that nobody serves: each name is a queue, and its messages would lie there
    429   what it may ask for later, with Retry-After

Each refusal says which limit, its value, and what was asked. What is refused is neither sent nor counted. The
counters are in Redis (`worker.state.tenant_limits`), so that limits hold across several servers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from producer.http.problems import RefusedError
from worker.contract.explain import short
from worker.contract.input_reference import jobs_of
from worker.contract.job import OPEN_REVISION
from worker.contract.job_parameters import DEFAULT_MODEL, DEFAULT_PRIORITY
from worker.contract.second_pass import pixel_steps

if TYPE_CHECKING:
    from producer.http.caller import Caller
    from producer.http.tenant_store import Tenant
    from producer.ingest.message_templates import TemplatedJob
    from worker.state.tenant_limits import Admission, TenantLimits

#: Seconds after which a client may try again while a tenant's jobs fill its queue.
FULL_RETRY_S: Final = 5
#: Messages that a tenant may have in a queue: so many for each job that it may have queued, and some.
_MESSAGES_A_JOB, _MORE_MESSAGES = 2, 10


class Limits:
    """The limits of the callers of one server. `run` calls what blocks in a thread."""

    def __init__(
        self,
        counters: TenantLimits,
        run: Callable[..., Awaitable[Any]],
        length: Callable[[str, str], int],
    ) -> None:
        """`length`: how many messages of a tenant wait in a queue."""
        self._counters, self._run, self._length = counters, run, length

    async def request(self, caller: Caller) -> None:
        """Count a request. Raises `RefusedError` (429)."""
        tenant = caller.limits
        if tenant is None or tenant.requests_per_s is None:
            return
        rate, burst = tenant.requests_per_s, burst_of(tenant)
        wait_s = await self._run(self._counters.request, tenant.name, rate, burst)
        if wait_s > 0:
            raise _later(
                f"The tenant {tenant.name} sends more than it may: its limit is {rate:g} requests a second, "
                f"and {burst:,} at once. Send this one again in {wait_s:.2g} s.",
                wait_s,
            )

    async def admit(
        self,
        caller: Caller,
        jobs: Sequence[TemplatedJob],
        served: Collection[tuple[str, str]],
        note: str = "",
    ) -> None:
        """Return where `caller` may submit all of `jobs` now, and count them. Raises `RefusedError`.

        `served`: names and revisions of the models that workers serve, or served last.
        `note` is a key in Redis that is the request's own: sent again, it is counted once.
        """
        tenant = caller.limits
        if tenant is None:
            return
        for number, job in enumerate(jobs):
            where = f"Job {number} of the list: " if len(jobs) > 1 else ""
            if reason := refusal(tenant, job.shape):
                raise _never(f"{where}{reason}")
            if reason := unserved(tenant, job.shape["model"], job.shape["revision"], served):
                raise RefusedError(404, f"{where}{reason}", code="NoModel")
        if tenant.max_queued is None and tenant.max_pixel_steps_a_day is None:
            return
        asked = [(job.id, pixel_steps(job.shape) or 0) for job in jobs]
        _refuse_more_than_ever(tenant, asked)
        parents = [" ".join(jobs_of(job.shape.get("image"), job.shape.get("mask"))) for job in jobs]
        if sentence := await self._run(crowded, tenant, jobs, self._length):
            raise _later(sentence, FULL_RETRY_S)
        found = await self._run(
            lambda: self._counters.admit(
                tenant.name,
                asked,
                most_open=tenant.max_queued,
                most_work=tenant.max_pixel_steps_a_day,
                note=note,
                parents=parents,
            )
        )
        if found.jobs < len(asked):
            raise _later(*stopped(tenant, found, asked))

    async def give_back(self, caller: Caller, jobs: Sequence[TemplatedJob], note: str = "") -> None:
        """Take back what `admit` has just counted: none of the jobs was sent."""
        tenant = caller.limits
        if tenant is not None and (tenant.max_queued or tenant.max_pixel_steps_a_day):
            asked = [(job.id, pixel_steps(job.shape) or 0) for job in jobs]
            await self._run(self._counters.give_back, tenant.name, asked, note)

    async def admit_run(self, caller: Caller, fields: Mapping[str, Any]) -> None:
        """Return where `caller` may upload a prompt file with `fields` for lines that do not set them.

        What a line asks for is looked at when it is read (`producer.http.run_limits`). Raises `RefusedError`.
        """
        if caller.limits is not None and (reason := refusal(caller.limits, fields, is_whole=False)):
            raise _never(reason)


def with_priority(tenant: Tenant | None, fields: Mapping[str, Any], default: int) -> dict[str, Any]:
    """`fields` with a priority that the tenant may have, where they say none."""
    if tenant is None or tenant.max_priority is None or "priority" in fields:
        return dict(fields)
    return {**fields, "priority": min(default, tenant.max_priority)}


def burst_of(tenant: Tenant) -> int:
    """Requests that a tenant with a limit of them may send at once."""
    return tenant.burst or max(1, math.ceil(2 * (tenant.requests_per_s or 0)))


def refusal(tenant: Tenant, fields: Mapping[str, Any], *, is_whole: bool = True) -> str:
    """Why a tenant may never have a job of these fields, in a sentence; empty where it may.

    Without `is_whole` what the fields lack is not looked at.
    """
    priority = fields.get("priority", DEFAULT_PRIORITY if is_whole else 0)
    if tenant.max_priority is not None and type(priority) is int and priority > tenant.max_priority:
        return f"priority is {priority}: the tenant {tenant.name} may ask for 0 to {tenant.max_priority}."
    for name, allowed in (("format", tenant.formats), ("model", tenant.models)):
        if allowed and name in fields and str(fields[name]) not in list(map(str, allowed)):
            named = ", ".join(map(str, allowed))
            return f"{name} is {short(str(fields[name]))}: the tenant {tenant.name} may use {named}."
    if tenant.max_pixel_steps is None and tenant.max_pixel_steps_a_day is None:
        return ""
    work = pixel_steps(fields)
    if work is None:
        unknown = (
            "What the model's own size and steps are is not known, as no worker of it runs, and the tenant "
            f"{tenant.name} has limits of them: give width, height and steps."
        )
        return unknown if is_whole else ""
    if tenant.max_pixel_steps is not None and work > tenant.max_pixel_steps:
        said = " x ".join(str(fields[name]) for name in ("width", "height", "steps"))
        said += " and of the second pass" if (fields.get("upscale") or 1) != 1 else ""
        return (
            f"width x height x steps is {said} = {work:,}: the tenant {tenant.name} may ask for up to "
            f"{tenant.max_pixel_steps:,} in a job. Ask for a smaller picture or fewer steps."
        )
    return ""


def unserved(tenant: Tenant, model: str, revision: str, served: Collection[tuple[str, str]]) -> str:
    """Why a tenant may not have a job of a model that is not among `served`, in a sentence; else empty.

    A model that the tenant's settings list may be asked for before a worker of it runs, at no revision of
    the caller's own: each would be a queue.
    """
    is_open = revision.startswith(OPEN_REVISION)
    if (model, revision) in served or (is_open and model in (DEFAULT_MODEL, *tenant.models)):
        return ""
    if not is_open and (model in tenant.models or model in [name for name, _ in served]):
        return (
            f"No worker serves the model {short(model)} at the revision {short(revision)}, nor did one "
            "lately: leave revision out."
        )
    return (
        f"No worker serves the model {short(model)}, nor did one lately: /v1/models has those that are "
        f"served. `smallcat tenants set {tenant.name} --model` lets the tenant ask for it before."
    )


def crowded(tenant: Tenant, jobs: Sequence[TemplatedJob], length: Callable[[str, str], int]) -> str:
    """Why a tenant's messages leave no room for those of `jobs`, in a sentence; empty where there is room.

    A job that was cancelled counts no longer, and its message lies in the queue until a worker takes it out.
    Lists that tenants share are not looked at.
    """
    if tenant.max_queued is None or tenant.owner != tenant.name:
        return ""
    most = _MESSAGES_A_JOB * tenant.max_queued + _MORE_MESSAGES
    for queue, more in Counter(job.route.queue for job in jobs).items():
        if (there := length(queue, tenant.name)) + more > most:
            return (
                f"{there:,} messages of the tenant {tenant.name} lie in one queue, those of cancelled jobs "
                f"included, and {more:,} more are asked for: its limit is {most:,}, twice its jobs and "
                f"{_MORE_MESSAGES}. Send them when workers have taken some."
            )
    return ""


def stopped(tenant: Tenant, found: Admission, asked: Sequence[tuple[str, int]]) -> tuple[str, float]:
    """Why jobs have to wait, in a sentence; and seconds until they are tried again."""
    if found.stopped == "day":
        hours, minutes = divmod(math.ceil(found.day_left_s / 60), 60)
        work = sum(each for _, each in asked)
        sentence = (
            f"{work:,} more pixel steps (width x height x steps) are asked for, and the tenant {tenant.name} "
            f"has submitted {found.spent:,} today: its limit is {tenant.max_pixel_steps_a_day or 0:,} a day. "
            f"The next day begins at 00:00 UTC, in {hours} h {minutes} min."
        )
        return sentence, found.day_left_s
    sentence = (
        f"{len(asked):,} more jobs are asked for, and {found.open:,} of the tenant {tenant.name} wait or "
        f"run: its limit is {tenant.max_queued or 0:,}. Send them when some of those have ended."
    )
    return sentence, FULL_RETRY_S


def _refuse_more_than_ever(tenant: Tenant, asked: Sequence[tuple[str, int]]) -> None:
    """Raise `RefusedError` (403) for more in one request than a limit, which no waiting helps."""
    count, work = len({job_id for job_id, _ in asked}), sum(each for _, each in asked)
    if tenant.max_queued is not None and count > tenant.max_queued:
        raise _never(
            f"The request asks for {count:,} jobs: the tenant {tenant.name} may have {tenant.max_queued:,} "
            "that wait or run. Send fewer at once."
        )
    most = tenant.max_pixel_steps_a_day
    if most is not None and work > most:
        raise _never(
            f"The request asks for {work:,} pixel steps (width x height x steps): the tenant {tenant.name} "
            f"may submit {most:,} a day. Send fewer or smaller jobs."
        )


def _never(sentence: str) -> RefusedError:
    return RefusedError(403, sentence, code="LimitExceeded")


def _later(sentence: str, wait_s: float) -> RefusedError:
    return RefusedError(
        429, sentence, code="LimitReached", headers={"Retry-After": str(max(1, math.ceil(wait_s)))}
    )
