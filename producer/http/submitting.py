"""From the fields of jobs to jobs in the queue: what all ways of submitting over HTTP have in common."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from producer.client import JobHandle
from producer.http import pictures
from producer.http.limits import with_priority
from producer.http.problems import InvalidJobsError, RefusedError
from producer.http.sending import Ready
from producer.ingest.message_templates import JobTemplates, TemplatedJob
from producer.prompts.values import INEXACT
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.job import JOB_FIELDS
from worker.contract.job_parameters import DEFAULT_PRIORITY
from worker.contract.webhook import WEBHOOK_SINCE, hook_of
from worker.tracing.submissions import send_span

if TYPE_CHECKING:
    from producer.http.backend import Backend
    from producer.http.caller import Caller

_INTEGERS: Final = frozenset(field.name for field in JOB_FIELDS.values() if field.kind is int)
#: Jobs, and characters of theirs, that are checked at once; more of them in a thread.
_FEW, _SHORT = 16, 2_000
#: Bits of a seed that is drawn, as `Job` draws it.
SEED_BITS: Final = 32


def new_submission(caller: Caller) -> str:
    """An id for a submission of `caller`: its first digits tell whose it is."""
    return caller.mark + secrets.token_hex(8)


async def check(
    backend: Backend,
    caller: Caller,
    items: Sequence[Any],
    seeds: Sequence[int] | None = None,
    *,
    is_list: bool = True,
) -> list[TemplatedJob]:
    """`caller`'s jobs of these fields, resolved. `seeds` are those of jobs that give none; None: drawn.

    Raises `InvalidJobsError` that names all that are wrong, or the `InvalidJobError` of a job alone;
    `QueueError`.
    """
    items, given = await pictures.take(backend, caller, items, is_list=is_list)
    templates = await backend.sender.templates()
    hosts = backend.settings.webhook_hosts
    if len(items) <= _FEW and sum(map(_length, items)) <= _SHORT:
        jobs = _checked(templates, caller, items, seeds, is_list, hosts)
    else:
        # Other requests go on meanwhile.
        jobs = await backend.run(_checked, templates, caller, items, seeds, is_list, hosts)
    # Of jobs that are refused nothing is stored.
    await pictures.store(backend, caller, given)
    return jobs


def _length(item: Any) -> int:
    """Characters of the texts of a job's fields."""
    values = item.values() if isinstance(item, Mapping) else [item]
    return sum(len(value) for value in values if isinstance(value, str))


def _checked(
    templates: JobTemplates,
    caller: Caller,
    items: Sequence[Any],
    seeds: Sequence[int] | None,
    is_list: bool,
    hosts: str,
) -> list[TemplatedJob]:
    """As `check`, by `templates`; `hosts` is `SMALLCAT_WEBHOOK_HOSTS`."""
    jobs: list[TemplatedJob] = []
    errors: list[tuple[int, str]] = []
    for number, item in enumerate(items):
        try:
            if not isinstance(item, Mapping):
                raise InvalidJobError(
                    f"A job is {short(item)}: it must be an object such as {{'prompt': ...}}."
                )
            if "images" in item:
                raise InvalidJobError(
                    f"images is {short(item['images'])}: a job here is one picture. For several of one "
                    "prompt send a list of jobs to /v1/jobs, each with its seed."
                )
            fields = {name: _whole(name, value) for name, value in item.items()}
            if "seed" not in fields or (type(fields["seed"]) is int and fields["seed"] == -1):
                fields["seed"] = seeds[number] if seeds else secrets.randbits(SEED_BITS)
            webhook = fields.pop("webhook", None)
            hook_of(webhook, hosts)
            job = templates.fill(_own(fields, caller), caller.owner)
            if webhook is not None:
                job = replace(job, webhook=webhook, version=max(job.version, WEBHOOK_SINCE))
            jobs.append(job)
        except InvalidJobError as error:
            if not is_list:
                raise
            errors.append((number, str(error)))
    if errors:
        raise InvalidJobsError(errors, len(items))
    return jobs


def _own(fields: dict[str, Any], caller: Caller) -> dict[str, Any]:
    """The fields as `caller` means them. A job as he was shown it says his own tenant, and may be sent so."""
    if fields.get("tenant") == caller.owner:
        fields = {name: value for name, value in fields.items() if name != "tenant"}
    return with_priority(caller.limits, fields, DEFAULT_PRIORITY)


def _whole(name: str, value: Any) -> Any:
    """JSON has one kind of numbers: 20.0 is an integer, and a large one that has lost digits is none."""
    is_whole = type(value) is float and value.is_integer() and abs(value) < INEXACT
    return int(value) if is_whole and name in _INTEGERS else value


def numbered(fields: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """`count` jobs of the same fields with seeds that follow each other, as AUTOMATIC1111 has them."""
    first = fields.get("seed", -1)
    if type(first) is int and first == -1:
        first = secrets.randbits(SEED_BITS)
    if type(first) is not int:
        return [dict(fields)]  # The job's own check says what is wrong.
    return [{**fields, "seed": first + number} for number in range(count)]


async def _sent(backend: Backend, ready: Sequence[Ready]) -> None:
    """Send jobs; their spans end then."""
    try:
        await backend.sender.send(ready)
    except BaseException as error:
        for each in ready:
            each.span.fail(error)
        raise
    finally:
        for each in ready:
            each.span.end()


async def send(
    backend: Backend,
    caller: Caller,
    jobs: Sequence[TemplatedJob],
    submissions: Sequence[str] | None = None,
    note: str = "",
) -> list[JobHandle]:
    """Send jobs for `caller`. Raises `RefusedError` where limits forbid it, `QueueError`.

    `note`: see `Limits.admit`.
    """
    await backend.limits.admit(caller, jobs, backend.sender.served, note)
    ids = submissions or [new_submission(caller) for _ in jobs]
    try:
        whose = caller.tenant or caller.owner
        hooks = [hook_of(job.webhook or None, backend.settings.webhook_hosts, caller.tenant) for job in jobs]
        spans = [send_span(job.id, job.route.queue) for job in jobs]
        parts = zip(jobs, ids, hooks, spans, strict=True)
        ready = [Ready(job, submission, whose, hook, span) for job, submission, hook, span in parts]
        await _sent(backend, ready)
    except RefusedError:  # Nothing was sent. After a `QueueError` some of it may have been.
        await backend.limits.give_back(caller, jobs, note)
        raise
    return [JobHandle(job.id, each, caller.owner) for job, each in zip(jobs, ids, strict=True)]
