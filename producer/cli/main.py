"""`python -m producer` and `smallcat`: jobs, runs of prompt files, the HTTP API and its keys.

Exit codes: 0, 1 (a job failed), 2 (usage), 3 (a service is out of reach). Results go to standard output, and
everything else to standard error. With `--json` every command prints one JSON document on standard output.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from producer.cli import local_stack, output_path, submit_notes
from producer.cli.failed import failed
from producer.cli.follow_jobs import cancel, handles_of, runs, status, submission_option
from producer.cli.forget import forget
from producer.cli.ingest import ingest_options, run_ingest
from producer.cli.job_options import given_fields, job_options, option_of
from producer.cli.json_output import NobodyReadsError, json_option, print_json, raise_last, say, say_error
from producer.cli.metrics import metrics
from producer.cli.serve import keys, serve
from producer.cli.shares import shares
from producer.cli.tenants import tenants
from producer.cli.usage import usage
from producer.cli.warm import warm
from producer.cli.webhooks import webhooks
from producer.client import JobHandle, submit_job
from producer.client.job_result import JobResult
from worker.contract.errors import (
    CallerError,
    JobCancelledError,
    JobError,
    ServiceError,
    SettingsError,
    SmallcatError,
    UnknownModelError,
)
from worker.contract.plain_log import ended, log_form
from worker.contract.plain_text import counted

#: Exit code where nobody reads standard output any more: that of a process that SIGPIPE ends.
BROKEN_PIPE = 141


class _Seconds(click.FloatRange):
    """Seconds to wait, 0 to a year."""

    name = "seconds"

    def __init__(self) -> None:
        super().__init__(min=0, max=31_536_000)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


SECONDS = _Seconds()

F = TypeVar("F", bound=Callable[..., Any])


_urls_option = click.option("--urls", is_flag=True, help="Print links beside files. JSON has them anyway.")


@dataclasses.dataclass(frozen=True)
class _Report:
    """What is made of a picture that is done."""

    save_in: Path | None
    _: dataclasses.KW_ONLY
    show: bool
    urls: bool
    as_json: bool
    #: Warnings that were said when the job was submitted.
    said: frozenset[str] = frozenset()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="smallcat")
def cli() -> None:
    """Submit text-to-image jobs, follow them, and fetch their pictures."""


@cli.command(context_settings={"token_normalize_func": option_of})
@click.argument("words", nargs=-1, required=True, metavar="PROMPT")
@job_options
@click.option(
    "--images",
    "-n",
    type=int,
    help="So many pictures, of consecutive seeds; each has its id and seed in a line. One when not given.",
)
@click.option("--wait", is_flag=True, help="Wait for the picture.")
@click.option("--show", is_flag=True, help="Wait, and show the picture in the terminal.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Wait, and save the picture: a folder, or a file such as cat.png.",
)
@click.option("--timeout", type=SECONDS, default=None, help="Seconds to wait; without end when not given.")
@click.option("--webhook", metavar="URL", help="Address of https that is told how the job ended.")
@_urls_option
@json_option
def submit(
    words: tuple[str, ...],
    images: int | None,
    wait: bool,
    show: bool,
    output: Path | None,
    timeout: float | None,
    webhook: str | None,
    urls: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Enqueue one job, or several of consecutive seeds.

    Without waiting it prints the job's id alone, with --images each id and seed; with --wait, --output or
    --show the id, the seed and the picture's address. Scripts use --json.
    """
    if len(words) > 1:
        raise click.UsageError(
            f"The prompt is one argument: write it in quotes, {shlex.quote(' '.join(words))}."
        )
    [prompt] = words
    given = given_fields(fields)
    output_path.check(output, None, images or 1)
    if (named := output_path.format_of(output)) is not None:
        given.setdefault("format", named)
        output_path.check(output, "jpeg" if given["format"] == "jpg" else given["format"])
    if webhook is not None:
        given["webhook"] = webhook
    handles = [submit_job(prompt, **given)] if images is None else submit_job(prompt, images=images, **given)
    said = submit_notes.of_prompts(handles[0], prompt, given.get("negative_prompt"))
    waits = bool(wait or show or output)
    submit_notes.of_workers(handles[0], waits=waits)
    seed = handles[0].record().job.seed if as_json or images is not None else 0
    names = [_names(each) | {"seed": seed + number} for number, each in enumerate(handles)]
    reports: list[dict[str, Any]] = names
    errors: list[Exception] = []
    if waits:
        how = _Report(output, show=show, urls=urls, as_json=as_json, said=said)
        reports, errors = _reports(handles, timeout, how)
    elif not as_json:
        for each in names:
            say(each["id"] if images is None else f"{each['id']}  seed {each['seed']}")
    if as_json and (reports or images is not None):
        print_json(reports[0] if images is None else reports)
    raise_last(errors)


cli.add_command(status)
cli.add_command(cancel)
cli.add_command(runs)
cli.add_command(failed)
cli.add_command(serve)
cli.add_command(keys)
cli.add_command(tenants)
cli.add_command(shares)
cli.add_command(metrics)
cli.add_command(usage)
cli.add_command(webhooks)
cli.add_command(forget)
cli.add_command(warm)


@cli.command()
@click.argument("job_ids", nargs=-1, required=True)
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(), help="Folder to save in, or a file."
)
@click.option("--timeout", type=SECONDS, default=None, help="Seconds to wait; without end when not given.")
@click.option("--show", is_flag=True, help="Show the pictures in the terminal.")
@submission_option
@_urls_option
@json_option
def fetch(
    job_ids: tuple[str, ...],
    output: Path,
    timeout: float | None,
    show: bool,
    submission: str,
    urls: bool,
    as_json: bool,
) -> None:
    """Wait for jobs to be done, and save their pictures."""
    output_path.check(output, None, len(job_ids))
    handles = handles_of(job_ids, submission)
    how = _Report(output, show=show, urls=urls, as_json=as_json)
    reports, errors = _reports(handles, timeout, how)
    if as_json:
        print_json(reports)
    raise_last(errors)


@cli.command()
@click.argument("source")
@click.option(
    "--output", type=click.Path(path_type=Path), help="The page; beside the manifest when not given."
)
@click.option("--embed", is_flag=True, help="Put thumbnails into the page: it shows them without the bucket.")
@click.option("--title", help="The manifest's name or the address when not given.")
@click.option(
    "--expires-s", type=int, default=604_800, help="Seconds for which the links work, up to 604800."
)
@click.option("--limit", type=int, default=20_000, help="Jobs on the page, at most; 20000 when not given.")
@json_option
def gallery(source: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Write one page with all pictures of a manifest, or below s3://BUCKET/PREFIX."""
    from producer.gallery.write import write_gallery

    page = write_gallery(source, output, **options)
    if as_json:
        print_json(dataclasses.asdict(page) | {"path": str(page.path)})
        return
    for notice in page.notices:
        say(f"note  {notice}", err=True)
    failed = f", {page.failed:,} failed" if page.failed else ""
    say(f"page  {page.path.resolve()}")
    say(f"      {counted(page.pictures, 'picture')}{failed}, {page.size / 1e6:.1f} MB")


@cli.command(context_settings={"token_normalize_func": option_of})
@ingest_options
@json_option
def ingest(files: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Render files of prompts (txt, csv, tsv, jsonl, parquet; - for standard input)."""
    sys.exit(run_ingest(files, options, as_json=as_json))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check Redis, the bucket, the workers, and the GPU of a worker's machine."""
    from producer.cli.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            mark, colour = ("ok  ", "green") if finding.ok else ("FAIL", "red")
            if finding.is_note:
                mark, colour = "note", "yellow"
            say(f"  {finding.what:10} {finding.text}", mark=mark, colour=colour)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    if not all(finding.ok for finding in findings):
        sys.exit(3)


def main() -> NoReturn:
    """Run the command line. An error that is no bug is one sentence and an exit code, without a traceback."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        say("Interrupted.", err=True)
        sys.exit(130)
    except (BrokenPipeError, NobodyReadsError):
        # Nothing more is flushed into it at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except (SmallcatError, OSError) as error:
        if log_form() == "json":
            raise ended(str(error), _exit_code(error)) from None
        say_error(error)
        if isinstance(error, ServiceError | SettingsError) and (text := local_stack.hint()):
            say(text, err=True)
        sys.exit(_exit_code(error))
    sys.exit(0)


def _exit_code(error: Exception) -> int:
    match error:
        case ServiceError():
            return 3
        # An unknown model is found by the worker: it is an error of the job, not of the command line.
        case JobError() | JobCancelledError() | UnknownModelError() | TimeoutError():
            return 1
        # Such as a folder that cannot be written.
        case CallerError() | OSError():
            return 2
        case _:
            return 1


def _names(handle: JobHandle) -> dict[str, str]:
    """What other commands know the submission by."""
    return {"id": handle.id, "submission": handle.submission}


def _reports(
    handles: Sequence[JobHandle],
    timeout: float | None,
    how: _Report,
) -> tuple[list[dict[str, Any]], list[Exception]]:
    """What `--json` prints of each job that is done, and the errors of the others. Waits for all."""
    reports: list[dict[str, Any]] = []
    errors: list[Exception] = []
    for handle in handles:
        try:
            report = _report(_follow(handle, timeout), how)
            reports.append(report | _names(handle))
        except (JobError, CallerError, TimeoutError) as error:  # Of one job: the others are fetched.
            errors.append(error)
    return reports, errors


def _follow(handle: JobHandle, timeout: float | None) -> JobResult:
    """Wait for the job; on a terminal with a progress bar on standard error. Ctrl-C does not cancel it."""
    from producer.cli.job_display import follow

    try:
        with warnings.catch_warnings():
            # The display shows beside the job's state that no worker serves it.
            warnings.simplefilter("ignore", UserWarning)
            return follow(handle, timeout)
    except KeyboardInterrupt:
        given_up = f"; or give it up: smallcat cancel {handle.id} --submission {handle.submission}"
        text = f"The job goes on. Fetch it later: smallcat fetch {handle.id}"
        say(err=True)
        say(f"{text}{given_up if handle.submission else ''}", err=True)
        raise


def _report(result: JobResult, how: _Report) -> dict[str, Any]:
    """Save and show the picture as the options say. Returns what `--json` prints of it."""
    path = None if how.save_in is None else output_path.save(result, how.save_in)
    if how.as_json:
        found = {"url": result.url(), "path": path and str(path), "seed": result.job.seed}
        return result.model_dump(mode="json") | found
    if how.show:
        from producer.cli.job_display import show_picture

        show_picture(result)
    for warning in (each for each in result.warnings if each not in how.said):
        say(f"note  {warning}", err=True)
    say(f"id    {result.id}")
    say(f"seed  {result.job.seed}")
    say(f"uri   {result.uri}")
    # It is long, and there is the file.
    if how.urls or path is None:
        say(f"url   {result.url()}")
    if path:
        say(f"file  {path.resolve()}")
    return {}
