"""The command `ingest`: its options, and what it prints. What it needs to run is imported when it runs."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from producer.cli.job_options import JOB_OPTIONS, fields_as_given, given_fields, job_options
from producer.cli.json_output import print_json, say
from producer.ingest.types import FILE_PRIORITY
from producer.prompts.fields import meaning_of
from producer.prompts.sources import FORMATS
from worker.contract.job import JOB_FIELDS
from worker.contract.plain_text import counted, plain_json

if TYPE_CHECKING:
    from producer.cli.ingest_display import QuietDisplay
    from producer.ingest.feeder import Ingest
    from producer.ingest.plan import Plan
    from producer.ingest.types import Outcome

F = TypeVar("F", bound=Callable[..., Any])

#: Exit codes beside those of `producer.cli.main`: Ctrl-C.
INTERRUPTED = 130
_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_IMAGE_FORMATS = ", ".join(JOB_FIELDS["format"].choices)

_OPTIONS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("--format", "formats"),
        {
            "multiple": True,
            "help": f"Of the files: {', '.join(FORMATS)}; or of the pictures: {_IMAGE_FORMATS}.",
        },
    ),
    (("--images", "-n"), {"type": int, "default": 1, "help": "Seeds for each prompt; 1 when not given."}),
    (
        ("--seed-start",),
        {
            "type": int,
            "help": "First seed of prompts that have none; derived from the line when not given.",
        },
    ),
    (
        ("--grid",),
        {
            "multiple": True,
            "metavar": "FIELD=A,B ...",
            "help": "Cross values, in place of what lines say: --grid steps=20,30 guidance_scale=5,7",
        },
    ),
    (
        ("--sample",),
        {"type": int, "help": "Texts to draw from a line's {a|b} and __wildcards__; all when not given."},
    ),
    (
        ("--wildcards",),
        {
            "type": _FOLDER,
            "help": "Folder with NAME.txt for __NAME__; wildcards/ beside the file when not given.",
        },
    ),
    (("--literal",), {"is_flag": True, "help": "Leave braces and __wildcards__ as they are."}),
    (
        ("--extra",),
        {"is_flag": True, "help": "Names that are nearly a job field's go to metadata, as others do."},
    ),
    (("--check",), {"is_flag": True, "help": "Check all lines, show how they are read, and send nothing."}),
    (("--strict",), {"is_flag": True, "help": "Send nothing if any line is wrong."}),
    (("--manifest",), {"type": _FILE, "help": "FILE.manifest.jsonl when not given; CSV if it ends in .csv."}),
    (("--download",), {"type": _FOLDER, "help": "Save the pictures here as they finish."}),
    (("--name",), {"help": "Template of the pictures' names; {line:06d}-{seed}-{slug}.png when not given."}),
    (
        ("--run",),
        {"help": "Name of the run, to resume it by; derived from the files when not given."},
    ),
    (
        ("--max-queued",),
        {
            "type": int,
            "default": 10_000,
            "help": "Jobs that wait in the queue, at most; 10000 when not given.",
        },
    ),
    (
        ("--detach",),
        {"is_flag": True, "help": "Queue everything and return; run the command again for the manifest."},
    ),
    (("--webhook",), {"metavar": "URL", "help": "Address of https that is told when all jobs have ended."}),
    (("--webhook-jobs",), {"is_flag": True, "help": "Tell it of each job, too."}),
    (("--quiet",), {"is_flag": True, "help": "Show no progress."}),
    (
        ("--lines",),
        {
            "is_flag": True,
            "help": "Print a line for each job, for logs; with --json a JSON object on standard output.",
        },
    ),
)


#: Options of the command that have a job field's name and mean more than it, such as `--format`.
_TAKEN = frozenset(name for names, _ in _OPTIONS for name in names)


def ingest_options(command: F) -> F:
    """Add the command's options. Job fields among them are defaults for lines that do not name them."""
    for names, settings in reversed(_OPTIONS):
        command = click.option(*names, **settings)(command)
    command = job_options(command, taken=_TAKEN, defaults={"priority": FILE_PRIORITY})
    return click.argument("files", nargs=-1, required=True)(command)


def run_ingest(files: Sequence[str], options: Mapping[str, Any], *, as_json: bool) -> int:
    """Run the command, and return its exit code. `options` has the options that `ingest_options` adds.

    Raises what `producer.ingest.submit_file.submit_file` does.
    """
    from producer.ingest.submit_file import check_options, make_ingest, webhook_of
    from producer.ingest.types import Options
    from worker.contract.errors import ServiceError

    plan = plan_of(files, options)
    run_options = Options(
        *(options["manifest"], options["run"], options["max_queued"], options["detach"], options["strict"]),
        webhook_of(options["webhook"], options["webhook_jobs"], plan.tenant),
        options["webhook_jobs"],
    )
    if options["check"]:
        from producer.cli.ingest_check import print_check

        check_options(run_options, options["download"], options["name"])
        return print_check(plan, as_json=as_json)
    display = _display(options, as_json=as_json)
    try:
        ingest = make_ingest(plan, run_options, display, options["download"], options["name"])
        _stop_on_ctrl_c(ingest, display)
        outcome = ingest()
    except ServiceError:
        display.close()
        say(f"Jobs that were sent go on. To send the rest: {_command()}", err=True)
        raise
    finally:
        display.close()
    _report(outcome, as_json=as_json, as_event=options["lines"])
    if outcome.state == "stopped":
        return INTERRUPTED
    return 0 if outcome.is_clean and outcome.state != "cancelled" else 1


def plan_of(files: Sequence[str], options: Mapping[str, Any]) -> Plan:
    """The plan that the command's arguments and options mean. Raises `PromptFileError`, `InvalidJobError`."""
    from producer.ingest.pictures import Pictures
    from producer.ingest.submit_file import (
        first_variants,
        grid_of,
        make_plan,
        make_variants,
        wildcards_folder,
    )
    from producer.session import session

    names = [each for each in files if not _is_axis(each)]
    grid = [*options["grid"], *(each for each in files if _is_axis(each))]
    untaken = {name: options[name] for name, each in JOB_OPTIONS.items() if each.option not in _TAKEN}
    file_format, formats = _formats(options["formats"])
    pictures = Pictures(session())
    variants = make_variants(
        given_fields(untaken) | formats,
        options["images"],
        options["seed_start"],
        grid_of(grid),
        options["sample"],
        wildcards_folder(options["wildcards"], names),
        literal=options["literal"],
        pictures=pictures,
    )
    plan = make_plan(
        names, file_format=file_format, variants=variants, extra=options["extra"], pictures=pictures
    )
    first = first_variants(variants, fields_as_given(untaken) | formats, grid)
    return dataclasses.replace(plan, first_variants=first)


def _is_axis(word: str) -> bool:
    """Whether an argument is one more axis of `--grid`: it names a job field, and no file."""
    axis, equals, _ = word.partition("=")
    return bool(equals) and meaning_of(axis) in JOB_FIELDS and not Path(word).exists()


def _formats(formats: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The files' format, and the pictures' as a job field: each `--format` is one or the other."""
    file_format = None
    fields = {}
    for each in formats:
        if each.lower() in FORMATS:
            file_format = each.lower()
        else:
            fields["format"] = each
    return file_format, fields


def _display(options: Mapping[str, Any], *, as_json: bool) -> QuietDisplay:
    from producer.cli.ingest_display import LineDisplay, LiveDisplay, QuietDisplay
    from producer.cli.plain_console import PlainConsole
    from producer.session import session

    console = PlainConsole(stderr=True)
    if options["quiet"]:
        return QuietDisplay(console)
    if options["lines"] or not console.is_terminal:
        events = sys.stdout if as_json and options["lines"] else None
        return LineDisplay(console, every_job=options["lines"], as_json=as_json, events=events)
    return LiveDisplay(console, session().bucket)


def _stop_on_ctrl_c(ingest: Ingest, display: QuietDisplay) -> None:
    """Ctrl-C once: send no more jobs. Twice: exit at once. Either way the run can be resumed."""

    def leave(*_: object) -> None:
        # It may come while the first handler prints, when a stream refuses a second writer.
        try:
            display.close()
        finally:
            os.write(2, f"Left. To go on: {_command()}\n".encode())
            os._exit(INTERRUPTED)

    def stop(*_: object) -> None:
        ingest.stop()
        signal.signal(signal.SIGINT, leave)
        display.notice("No more is sent. Waiting for what was; Ctrl-C again leaves at once.")
        display.notice(f"To go on later: {_command()}")

    signal.signal(signal.SIGINT, stop)


def _report(outcome: Outcome, *, as_json: bool, as_event: bool) -> None:
    if as_json:
        values = dataclasses.asdict(outcome)
        values["rejected_files"] = [str(path) for path in outcome.rejected_files]
        values["manifest"] = outcome.manifest and str(outcome.manifest)
        if as_event:  # The last of the lines.
            say(plain_json({"event": "end", **values}, indent=None))
        else:
            print_json(values)
        return
    parts = [f"{outcome.done:,} done"]
    if outcome.cached:
        parts[0] += f" ({outcome.cached:,} were there already)"
    others = {name: getattr(outcome, name) for name in ("failed", "cancelled", "rejected")}
    parts += [f"{number:,} {name}" for name, number in others.items() if number]
    say(f"run       {outcome.run} {outcome.state}: {', '.join(parts)}")
    if outcome.total == 0 and not outcome.rejected:
        say("note      the files have no prompts")
    if outcome.state == "detached":
        say(f"sent      {counted(outcome.sent, 'job')}; for the manifest: {_command()}")
    if outcome.manifest:
        say(f"manifest  {outcome.manifest.resolve()}")
    for path in outcome.rejected_files:
        say(f"rejected  {path.resolve()}")
    if outcome.failed:
        say("failed    see: smallcat failed list")


def _command() -> str:
    """This command line, to run it again."""
    words = [word for word in sys.argv[1:] if word != "--detach"]
    return shlex.join(["smallcat", *words])
