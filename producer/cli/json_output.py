"""What commands print: text, or with `--json` a document."""

from __future__ import annotations

from collections.abc import Callable
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
    """Print `value` on standard output."""
    click.echo(plain_json(value))


def say(text: str, *, err: bool = False) -> None:
    """Print text on standard output, or error. Characters that are not seen are escaped."""
    click.echo(plain(text, keep="\n"), err=err)
