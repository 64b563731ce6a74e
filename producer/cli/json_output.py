"""What commands print: lines of text, or with `--json` a document."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from worker.contract.plain_text import plain, plain_json

F = TypeVar("F", bound=Callable[..., Any])


class NobodyReadsError(Exception):
    """Raised when whoever read standard output has gone, as `head` does after its last line."""


def json_option(command: F) -> F:
    """Add the option `--json` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def print_json(value: Any) -> None:
    """Print `value` on standard output, as JSON in which nothing is hidden."""
    click.echo(plain_json(value))


def say(text: object = "", *, err: bool = False, mark: str = "", colour: str | None = None) -> None:
    """Print a line on standard output, or error: all that commands print goes through here.

    Whoever reaches Redis has written some of it. So what is not seen is escaped, line breaks as well, and no
    text can move the cursor, begin another line or change the direction of writing. `mark` stands before it,
    in `colour`; without one the text is in that colour. Where nobody sees colours, there are none.
    """
    shown = plain(text)
    if colour is not None:
        shown = f"{click.style(mark, fg=colour)}{shown}" if mark else click.style(shown, fg=colour)
    click.echo(shown, err=err)


def moment(seconds: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A time by the clock of this place; of Unix seconds that no clock shows, so many words."""
    try:
        return time.strftime(form, time.localtime(seconds)) if seconds else "unknown time"
    except (ValueError, OverflowError, OSError):
        return "unknown time"


def say_error(error: object) -> None:
    """Print what a command ends with on standard error, in red. Its further lines are indented."""
    first, *others = str(error).split("\n")
    for line in (first, *(f"  {each}" for each in others)):
        say(line, err=True, colour="red")


def raise_last(errors: Sequence[Exception]) -> None:
    """Print all errors but the last one, which is raised: it becomes the exit code."""
    for each in errors[:-1]:
        say_error(each)
    if errors:
        raise errors[-1]
