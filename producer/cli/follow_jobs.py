"""The commands `status`, `cancel` and `runs`: what has become of jobs and runs, and ending them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from producer.cli.job_lines import lines_of
from producer.cli.json_output import json_option, moment, print_json, raise_last, say
from producer.client import JobHandle
from producer.client.job_result import JobResult
from producer.session import session
from worker.contract.errors import CallerError, UnknownJobError
from worker.contract.plain_text import counted
from worker.state.hashes import JOB_ID

if TYPE_CHECKING:
    from producer.ingest.runs import RunInfo
    from worker.contract.job import Job

F = TypeVar("F", bound=Callable[..., Any])

#: Characters of a prompt in a list.
_SHOWN = 60


def submission_option(command: F) -> F:
    """Add the option `--submission` to a command that has `job_ids`."""
    text = "Of one job: the submission of that name, as `smallcat submit --json` prints it."
    return click.option("--submission", default="", help=text)(command)


def handles_of(job_ids: Sequence[str], submission: str) -> list[JobHandle]:
    """The handles of jobs, or of one submission of one job.

    Raises `CallerError` for a submission of several jobs, `UnknownJobError` where nothing is known of it.
    """
    if not submission:
        return [JobHandle(job_id) for job_id in job_ids]
    if len(job_ids) != 1:
        raise CallerError(f"--submission {submission} is of one job: give one id, not {len(job_ids)}.")
    now = session()
    with now.queue_errors():
        own, _ = now.records.submission(job_ids[0], submission)
    if not own:
        raise UnknownJobError(
            f"There is no submission {submission} of job {job_ids[0]}: that is wrong, or it expired."
        )
    return [JobHandle(job_ids[0], submission)]


@click.command()
@click.argument("job_ids", nargs=-1)
@click.option("--run", help="The run of that name instead: see `smallcat runs`.")
@submission_option
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000),
    default=20,
    help="Without ids: that many of the latest jobs, 20 when not given.",
)
@click.option("--urls", is_flag=True, help="Links to the pictures, in lists too. JSON has them anyway.")
@json_option
def status(
    job_ids: tuple[str, ...], run: str | None, submission: str, limit: int, urls: bool, as_json: bool
) -> None:
    """Show the state of jobs or of a run; without ids the latest jobs, but for those of runs."""
    if run is not None:
        _refuse_ids((*job_ids, *filter(None, [submission])))
        _show_runs([_run(run)], as_json=as_json, alone=True)
    elif job_ids or submission:
        _status(handles_of(job_ids, submission), urls=urls, as_json=as_json)
    else:
        _latest(limit, urls=urls, as_json=as_json)


@click.command()
@click.argument("job_ids", nargs=-1)
@click.option("--run", help="All jobs of the run of that name: see `smallcat runs`.")
@submission_option
@json_option
def cancel(job_ids: tuple[str, ...], run: str | None, submission: str, as_json: bool) -> None:
    """Cancel jobs for all that want them, or a run: queued jobs at once, running ones at their next step.

    With --submission, that one alone gives the job up; it goes on while others want it.
    """
    if run is not None:
        _refuse_ids((*job_ids, *filter(None, [submission])))
        _cancel_run(run, as_json=as_json)
        return
    if not job_ids:
        raise CallerError("Which jobs? Give their ids, or --run and the name of a run.")
    states: dict[str, str] = {}
    unknown: list[UnknownJobError] = []
    for handle in handles_of(job_ids, submission):
        try:
            states[handle.id] = handle.cancel()
        except UnknownJobError as error:
            states[handle.id] = "unknown"
            unknown.append(error)
    if as_json:
        print_json(states)
    else:
        for job_id, state in states.items():
            shown = f"was {state} already" if state in ("done", "failed") else state
            say(f"{job_id}  {'cancelling' if state == 'running' else shown}")
    raise_last(unknown)


@click.command()
@json_option
def runs(as_json: bool) -> None:
    """List the runs of prompt files, the one begun or resumed last first."""
    from producer.ingest.runs import list_runs

    now = session()
    with now.queue_errors():
        found = list_runs(now.redis)
    _show_runs(found, as_json=as_json)


def _status(handles: Sequence[JobHandle], *, urls: bool, as_json: bool) -> None:
    """Show each job, with `urls` its link. All are shown, whichever of them is unknown."""
    shown: list[dict[str, Any]] = []
    unknown: list[UnknownJobError] = []
    for handle in handles:
        try:
            record, progress = handle.record(), handle.progress()
        except UnknownJobError as error:
            unknown.append(error)
            shown.append({"id": handle.id, "state": "unknown", "error": str(error)})
            if not as_json:
                say(f"{handle.id}  unknown")
            _hint_at_run(handle.id)
            continue
        shown.append(
            record.model_dump(mode="json")
            | {"queued": progress.queued, "note": progress.note, **_link(record)}
        )
        if as_json:
            continue
        say(f"{record.id}  {record.state}")
        _show_job(record.job)
        if record.steps:
            say(f"step       {progress.step} of {progress.steps}")
        if progress.queued:
            say(f"queue      {progress.queued} waiting, {counted(progress.workers, 'worker')}")
        for name in ("worker", "uri", "error"):
            if value := getattr(record, name):
                say(f"{name:10} {value}")
        for url in _link(record).values() if urls else ():
            say(f"url        {url}")
        for warning in (*record.warnings, progress.note):
            if warning:
                say(f"note       {warning}")
    if as_json:
        print_json(shown if len(handles) > 1 else shown[0])
    raise_last(unknown)


def _show_job(job: Job) -> None:
    """What was asked for."""
    say(f"prompt     {_short(job.prompt)}")
    say(f"seed       {job.seed}")
    if job.width and job.height:
        say(f"size       {job.width}x{job.height}")
    for line in lines_of(job):
        say(line)
    if job.tenant:
        say(f"tenant     {job.tenant}")


def _hint_at_run(name: str) -> None:
    """Say so where an unknown job's id is a run's name."""
    if not JOB_ID.fullmatch(name):
        with contextlib.suppress(UnknownJobError):
            _run(name)
            say(f"note       {name} is a run: smallcat status --run {name}", err=True)


def _latest(limit: int, *, urls: bool, as_json: bool) -> None:
    now = session()
    with now.queue_errors():
        records = [JobResult.of(record) for record in now.latest(limit)]
    if as_json:
        print_json([record.model_dump(mode="json") | _link(record) for record in records])
        return
    for record in records:
        at = moment(record.submitted_at)
        say(f"{record.id}  {record.state:9}  {at}  seed {record.seed}  {_short(record.job.prompt)}")
        for url in _link(record).values() if urls else ():
            say(f"    {url}")
    if not records:
        say("No job was submitted lately; for prompt files see: smallcat runs", err=True)


def _link(record: JobResult) -> dict[str, str]:
    """The link to a picture that is done, where the bucket's address can be made here."""
    if record.uri is None:
        return {}
    try:
        return {"url": record.url()}
    except CallerError:
        return {}  # The bucket is not set here: Redis alone says what has become of a job.


def _run(run: str) -> RunInfo:
    from producer.ingest.runs import find_run

    now = session()
    with now.queue_errors():
        return find_run(now.redis, run)


def _cancel_run(run: str, *, as_json: bool) -> None:
    from producer.ingest.runs import cancel_run

    now = session()
    with now.queue_errors():
        before = cancel_run(now.redis, now.records, run)
    info = _run(run)
    if as_json:
        print_json(_values(info))
        return
    if before.state in ("finished", "cancelled"):
        say(f"run       {run} {before.state} already")
        return
    left = info.sent - info.ended
    say(f"run       {run} cancelled: {info.done:,} done, {left:,} queued or running are given up")


def _show_runs(found: list[RunInfo], *, as_json: bool, alone: bool = False) -> None:
    if as_json:
        values = [_values(info) for info in found]
        print_json(values[0] if alone else values)
        return
    for info in found:
        of = f"{info.ended:,} of {info.total:,}" if info.total is not None else f"{info.sent:,} sent"
        parts = [of, f"{info.done:,} done"]
        counts = {"failed": info.failed, "cancelled": info.cancelled, "rejected": info.rejected}
        parts += [f"{count:,} {what}" for what, count in counts.items() if count]
        if info.waiting:
            parts.append(counted(info.waiting, "waits for another's picture", "wait for others' pictures"))
        files = ", ".join(info.files) or "-"
        say(f"{info.run}  {info.state:9}  {_age(info.created)}  {', '.join(parts)}  {files}")
        if info.feeder:
            say(f"    fed by {info.feeder[0].lower()}{info.feeder[1:]}")
        if alone and info.manifest:
            say(f"    manifest {info.manifest}")
    if not found:
        say("Redis remembers no run.", err=True)


def _values(info: RunInfo) -> dict[str, Any]:
    return dataclasses.asdict(info) | {"age_s": max(0, int(time.time()) - info.created)}


def _age(created: int) -> str:
    """How long ago that was, in its largest unit: `3 min`."""
    seconds = max(0, int(time.time()) - created)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _short(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


def _refuse_ids(named: Sequence[str]) -> None:
    if named:
        raise CallerError("Give ids or --run, not both.")
