"""Jobs that failed for good: list them, show one, submit them again, forget them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from producer.cli.job_lines import lines_of
from producer.cli.json_output import json_option, moment, print_json, raise_last, say
from producer.client import JobHandle, submit_job
from producer.client.job_result import JobResult
from producer.session import session
from worker.contract import errors
from worker.contract.errors import CallerError, InvalidJobError, PoisonJobError, UnknownJobError
from worker.contract.input_reference import jobs_of
from worker.contract.message import RunMark
from worker.contract.plain_text import counted
from worker.contract.record import State

if TYPE_CHECKING:
    from worker.state.failures import Failure
    from worker.state.parked import ParkedMessage

F = TypeVar("F", bound=Callable[..., Any])

#: Characters that are shown of a message that no worker can read.
_SHOWN: Final = 200


def find(
    job_ids: Sequence[str] = (), *, error_type: str | None = None, run: str | None = None
) -> list[Failure]:
    """The jobs that failed for good, the latest first; those of `job_ids` in their order.

    Of these, only those that failed with the error class named `error_type`, and those that belong to the
    prompt file's run `run`. Raises `UnknownJobError` for an id that is no failed job's, and for an unknown
    run, `CallerError` for an unknown error class, `QueueError`.
    """
    now = session()
    with now.queue_errors():
        failures = now.failures.list()
    if error_type is not None:
        _refuse_unknown_class(error_type, {failure.error_type for failure in failures})
    if job_ids:
        by_id = {failure.id: failure for failure in failures}
        for job_id in job_ids:
            if job_id not in by_id:
                raise _unknown(job_id)
        failures = [by_id[job_id] for job_id in job_ids]
    found = [
        failure
        for failure in failures
        if (error_type is None or failure.error_type == error_type)
        and (run is None or any(RunMark.parse(mark).run == run for mark in failure.runs))
    ]
    if run is not None and not found:
        from producer.ingest.runs import find_run

        with now.queue_errors():
            find_run(now.redis, run)
    return found


def _refuse_unknown_class(name: str, found: Iterable[str]) -> None:
    """Raise `CallerError` for a class of errors that there is not, and with which no job failed."""
    kinds = {each.__name__ for each in vars(errors).values() if isinstance(each, type)}
    if name in kinds or name in found:
        return
    near = difflib.get_close_matches(name, [*kinds, *found], 1)
    hint = f"did you mean {near[0]}?" if near else "docs/errors.md lists them."
    raise CallerError(f"There is no error class {name[:60]!r}: {hint}")


def select(
    job_ids: Sequence[str] = (), *, error_type: str | None = None, run: str | None = None
) -> list[JobResult]:
    """The whole records of the jobs that `find` finds. Raises as `find`.

    A record that expires meanwhile is left out, unless its id was given: then it is unknown.
    """
    now = session()
    ids = [failure.id for failure in find(job_ids, error_type=error_type, run=run)]
    with now.queue_errors():
        records = now.records.read(ids)
    for job_id in ids if job_ids else ():
        if job_id not in records:
            raise _unknown(job_id)
    failed = (records[job_id] for job_id in ids if job_id in records)
    return [_with_last_error(JobResult.of(record)) for record in failed if record.state is State.FAILED]


def retry(records: Iterable[JobResult]) -> tuple[list[JobHandle], list[InvalidJobError]]:
    """Submit the jobs again, with all their attempts; those of a run belong to it.

    Those that begin with the pictures of others come after them. The handles, and an error for each job that
    is refused: an earlier version took it, or it begins with the picture of a job that has failed and is not
    among them. Raises `QueueError`.
    """
    left = {record.id: record for record in records}
    handles, refused = list[JobHandle](), list[InvalidJobError]()
    for job_id in _parents_first(left):
        try:
            handles.append(submit_job(left[job_id].job))
        except InvalidJobError as error:
            refused.append(InvalidJobError(f"Job {job_id} is not submitted again: {error}"))
    return handles, refused


def _parents_first(records: Mapping[str, JobResult]) -> list[str]:
    """The ids of the jobs, each after those with whose pictures it begins."""
    parents = {
        job_id: [each for each in jobs_of(record.job.image, record.job.mask) if each in records]
        for job_id, record in records.items()
    }
    return list(TopologicalSorter(parents).static_order())


def drop(job_ids: Sequence[str]) -> int:
    """Forget the jobs. Returns how many there were to forget. Raises `QueueError`."""
    now = session()
    with now.queue_errors():
        return now.failures.drop(job_ids)


def require_choice(job_ids: Sequence[str], filters: Sequence[object], everything: bool) -> None:
    """Raise `CallerError` where a command names no jobs: no ids, no filter, and not `--all`."""
    if not (job_ids or any(filters) or everything):
        raise CallerError("Which jobs? Give ids, --error or --run, or --all for every failed job.")


def line(failure: Failure) -> str:
    """A failed job in one line."""
    return f"{failure.id}  {moment(failure.at)}  {failure.error_type}: {failure.error}"


def lines(record: JobResult) -> list[str]:
    """A failed job in full: its parameters and each of its attempts."""
    job = record.job
    scheduler = f"{job.scheduler} {job.schedule}".removesuffix(" default")
    at = record.tries[-1].at if record.tries else record.submitted_at
    shown = [
        f"{record.id}  {moment(at)}  {record.error_type}: {record.error}",
        f"prompt     {job.prompt!r}",
        f"size       {job.width}x{job.height}, {job.steps} steps, seed {job.seed}, {scheduler}",
        *lines_of(job, without=("schedule",)),
        f"model      {job.model} at {job.revision}",
        *(f"run        {RunMark.parse(mark).run}" for mark in record.runs),
    ]
    for each in record.tries:
        when = moment(each.at, "%H:%M:%S")
        ended = f"{each.error_type}: {each.error}" if each.error_type else "its worker died or fell silent"
        shown.append(f"attempt {each.attempt}  {when} on {each.worker}: {ended}")
    return shown


def unreadable() -> list[dict[str, Any]]:
    """The messages from which no worker could read a job, the latest first, as JSON. Raises `QueueError`."""
    now = session()
    with now.queue_errors():
        found = now.failures.unreadable()
    return [each._asdict() | {"message": each.message.decode(errors="backslashreplace")} for each in found]


def parked() -> list[dict[str, Any]]:
    """How many messages wait for a worker of a newer version, as JSON. Raises `QueueError`."""
    from worker.state.parked import parked as read

    now = session()
    with now.queue_errors():
        found = read(now.redis)
    return [
        {"queue": queue, "version": version, "messages": count} for (queue, version), count in found.items()
    ]


def parked_messages(job_ids: Sequence[str] = ()) -> Iterator[ParkedMessage]:
    """The messages that wait for a worker of a newer version; only those of `job_ids`, where some are given.

    Raises `UnknownJobError` at the end for an id of which there was none, `QueueError`.
    """
    from worker.state.parked import parked_messages as read

    now = session()
    missing = set(job_ids)
    with now.queue_errors():
        for message in read(now.redis):
            if not job_ids or message.job in job_ids:
                missing.discard(message.job)
                yield message
    for job_id in sorted(missing):
        raise UnknownJobError(f"No parked message is of job {job_id}: see `smallcat failed list --parked`.")


def drop_parked(messages: Iterable[ParkedMessage]) -> int:
    """Delete parked messages; their jobs have failed then. Returns how many. Raises `QueueError`."""
    from worker.state.parked import drop_parked as drop_one

    now = session()
    with now.queue_errors():
        return sum(drop_one(now.redis, now.records, message) for message in list(messages))


def unreadable_lines() -> Iterator[str]:
    """What `unreadable` and `parked` return, for a terminal: what others wrote is escaped."""
    for each in unreadable():
        when = moment(each["at"])
        start = ascii(each["message"][:_SHOWN])[1:-1]
        yield f"{when}  {ascii(each['queue'])[1:-1]}  {ascii(each['reason'])[1:-1]} ({each['size']:,} bytes)"
        yield f"  {start}{'...' if each['size'] > _SHOWN else ''}"
    yield from parked_lines()


def parked_lines() -> Iterator[str]:
    """What `parked` returns, for a terminal."""
    for each in parked():
        queue = ascii(each["queue"])[1:-1]
        of = f"of version {each['version']}"
        waits = counted(each["messages"], f"message {of} waits", f"messages {of} wait")
        yield f"{queue}  {waits} for a newer worker"


def parked_line(message: ParkedMessage) -> str:
    """A parked message in one line."""
    shown = [ascii(text)[1:-1] for text in (message.job or "unknown", message.queue, message.shown)]
    return f"{shown[0]}  {shown[1]}  version {message.version}  {shown[2]}"


def _with_last_error(record: JobResult) -> JobResult:
    """`record` with the error of its last attempt there, too: the job's own, unless the worker died."""
    if (
        not record.tries
        or record.tries[-1].error_type
        or record.error_type in (None, PoisonJobError.__name__)
    ):
        return record
    *others, last = record.tries
    last = last.model_copy(update={"error_type": record.error_type, "error": record.error})
    return record.model_copy(update={"tries": (*others, last)})


def _unknown(job_id: str) -> UnknownJobError:
    return UnknownJobError(f"No failed job has the id {job_id}: see `smallcat failed list`.")


@click.group()
def failed() -> None:
    """List, show, retry or drop jobs that failed for good."""


def _failed_options(command: F) -> F:
    for option in (
        click.argument("job_ids", nargs=-1),
        click.option("--error", "error_type", help="Only those that failed with this class of error."),
        click.option("--run", help="Only those of this run of a prompt file."),
        json_option,
    ):
        command = option(command)
    return command


def _parked_option(command: F) -> F:
    text = "Messages that wait for a worker of a newer version."
    return click.option("--parked", "of_parked", is_flag=True, help=text)(command)


def _refuse_filters(option: str, *filters: object) -> None:
    if any(filters):
        raise click.UsageError(f"{option} is about messages: leave out --error, --run and --unreadable.")


@failed.command("list")
@_failed_options
@click.option(
    "--unreadable", "of_messages", is_flag=True, help="Messages from which no worker could read a job."
)
@_parked_option
def failed_list(
    job_ids: tuple[str, ...],
    error_type: str | None,
    run: str | None,
    of_messages: bool,
    of_parked: bool,
    as_json: bool,
) -> None:
    """List failed jobs, the latest first."""
    if of_parked:
        _refuse_filters("--parked", error_type, run, of_messages)
        found = parked_messages(job_ids)
        if as_json:
            print_json([each.shown_as() for each in found])
            return
        for message in found:
            say(parked_line(message))
        return
    if of_messages:
        if job_ids or error_type or run:
            raise click.UsageError("--unreadable lists messages: leave out ids, --error and --run.")
        if as_json:
            print_json({"unreadable": unreadable(), "parked": parked()})
            return
        for each in unreadable_lines():
            say(each)
        return
    if as_json:
        records = select(job_ids, error_type=error_type, run=run)
        print_json([record.model_dump(mode="json") for record in records])
        return
    failures = find(job_ids, error_type=error_type, run=run)
    for failure in failures:
        say(line(failure))
    if not failures:
        chosen = f" with {error_type}" if error_type else ""
        chosen += f" in the run {run}" if run else ""
        say(f"No job failed for good{chosen}.", err=True)
    for each in parked_lines() if not (job_ids or error_type or run) else ():
        say(f"note  Not failed: {each}: upgrade one", err=True)


@failed.command("show")
@click.argument("job_ids", nargs=-1, required=True)
@json_option
def failed_show(job_ids: tuple[str, ...], as_json: bool) -> None:
    """Show failed jobs with their parameters and each of their attempts."""
    records = select(job_ids)
    if as_json:
        print_json([record.model_dump(mode="json") for record in records])
        return
    for record in records:
        for each in lines(record):
            say(each)


@failed.command("retry")
@_failed_options
@click.option("--all", "everything", is_flag=True, help="Every failed job.")
def failed_retry(
    job_ids: tuple[str, ...], error_type: str | None, run: str | None, everything: bool, as_json: bool
) -> None:
    """Submit failed jobs again, with all their attempts."""
    require_choice(job_ids, (error_type, run), everything)
    handles, refused = retry(select(job_ids, error_type=error_type, run=run))
    if as_json:
        print_json([handle.id for handle in handles])
    else:
        say(f"{len(handles)} submitted again")
    raise_last(refused)


@failed.command("drop")
@_failed_options
@click.option("--all", "everything", is_flag=True, help="Every failed job.")
@_parked_option
def failed_drop(
    job_ids: tuple[str, ...],
    error_type: str | None,
    run: str | None,
    everything: bool,
    of_parked: bool,
    as_json: bool,
) -> None:
    """Delete the records of failed jobs; with --parked, messages, whose jobs have failed then."""
    require_choice(job_ids, (error_type, run), everything)
    if of_parked:
        _refuse_filters("--parked", error_type, run)
        count = drop_parked(parked_messages(job_ids))
        if as_json:
            print_json({"dropped": count})
            return
        say(f"{counted(count, 'message')} dropped: their jobs have failed")
        return
    count = drop([failure.id for failure in find(job_ids, error_type=error_type, run=run)])
    if as_json:
        print_json({"dropped": count})
        return
    say(f"{count} forgotten")
