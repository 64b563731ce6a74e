"""Jobs that failed for good: list them, look at one, try them again, forget them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from producer.client import JobHandle, JobResult, submit_job
from worker.contract.errors import CallerError, UnknownJobError
from worker.contract.record import State


def select(
    job_ids: Sequence[str] = (), *, error_type: str | None = None, run: str | None = None
) -> list[JobResult]:
    """The records of jobs that failed for good, the latest first.

    All of them, or those of `job_ids`; of these, those that failed with the error class named `error_type`
    and those that belong to the prompt file's run `run`. Raises `UnknownJobError` for an id that is no
    failed job's, `QueueError`.
    """
    from producer.client import _client

    client = _client()
    with client.queue_errors():
        failed = client.records.failures()
    for job_id in job_ids:
        if job_id not in failed:
            raise UnknownJobError(f"No failed job has the id {job_id}: see `smallcat failed list`.")
    records = (JobHandle(job_id).record() for job_id in job_ids or failed)
    return [
        record
        for record in records
        if record.state is State.FAILED
        and (error_type is None or record.error_type == error_type)
        and (run is None or any(mark.startswith(f"{run}:") for mark in record.runs))
    ]


def retry(records: Iterable[JobResult]) -> list[JobHandle]:
    """Submit the jobs again, with all their attempts; those of a run belong to it. Raises `QueueError`."""
    return [submit_job(record.job) for record in records]


def drop(records: Iterable[JobResult]) -> int:
    """Forget the jobs. Returns how many there were to forget. Raises `QueueError`."""
    from producer.client import _client

    client = _client()
    with client.queue_errors():
        return sum(client.records.drop(record.id) for record in records)


def refuse_all_unasked(job_ids: Sequence[str], filters: Sequence[object], everything: bool) -> None:
    """Raise `CallerError` where a command without ids or filters would take every failed job unasked."""
    if not (job_ids or any(filters) or everything):
        raise CallerError("Which jobs? Give ids, --error or --run, or --all for every failed job.")


def line(record: JobResult) -> str:
    """A failed job in one line."""
    at = record.tries[-1].at if record.tries else record.submitted_at
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    return f"{record.id}  {when}  {record.error_type}: {record.error}"


def lines(record: JobResult) -> list[str]:
    """A failed job in full: its parameters and each of its attempts."""
    job = record.job
    told = [
        line(record),
        f"prompt     {job.prompt!r}",
        f"size       {job.width}x{job.height}, {job.steps} steps, seed {job.seed}, {job.scheduler}",
        f"model      {job.model} at {job.revision}",
        *(f"run        {mark.split(':')[0]}" for mark in record.runs),
    ]
    for each in record.tries:
        when = time.strftime("%H:%M:%S", time.localtime(each.at))
        ended = f"{each.error_type}: {each.error}" if each.error_type else "its worker died, or gave no word"
        told.append(f"attempt {each.attempt}  {when} on {each.worker}: {ended}")
    return told
