"""The fields of a job as command-line options, made from the table of job fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeVar

import click

from producer.prompts.fields import COUNT, meaning_of
from producer.prompts.values import NOT_GIVEN, value_in_call, value_of
from worker.contract.explain import short
from worker.contract.job import WRITTEN_FIELDS, Job
from worker.contract.job_fields import NESTED, FieldEntry, help_lines

F = TypeVar("F", bound=Callable[..., Any])


#: How help texts call the types of values, and how errors do.
_TYPES = {int: "integer", float: "float", bool: "boolean"}
_CALLED = {int: "integer", float: "number", bool: "boolean (true or false)"}


class _Value(click.ParamType[Any]):
    """A job field's value: a number as it is read in prompt files, a text as it was given."""

    def __init__(self, entry: FieldEntry) -> None:
        self._entry = entry
        self.name = _TYPES.get(entry.kind, "text")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self._entry.kind is str:
            return value
        read = value_in_call(self._entry, value)
        if isinstance(read, str):
            self.fail(f"{short(value)} is no {_CALLED.get(self._entry.kind, 'number')}.", param, ctx)
        return None if read is NOT_GIVEN else read


#: The fields that are options, by their names. A required field is an argument instead.
JOB_OPTIONS: Mapping[str, FieldEntry] = {
    name: entry for name, entry in WRITTEN_FIELDS.items() if not entry.is_required
}


def job_options(command: F, *, taken: Container[str] = (), defaults: Mapping[str, Any] | None = None) -> F:
    """Add the options to a command, but for those that are `taken`: there they mean something else.

    `defaults` are the command's own defaults by field, for the help texts.
    """
    for name, entry in reversed(list(JOB_OPTIONS.items())):
        if entry.option not in taken:
            # An object is given as JSON, a list as a text for each of its values.
            kind = str if entry.kind in NESTED else _Value(entry)
            text = _help(entry, (defaults or {}).get(name, entry.default))
            # Without a value, one that says yes or no says yes.
            more: dict[str, Any] = {"default": None}
            if entry.kind is bool:
                more |= {"is_flag": False, "flag_value": "true"}
            if entry.kind is list:
                more = {"multiple": True, "callback": _none_is_not_given}
            called = dict.fromkeys((entry.option, f"--{name.replace('_', '-')}"))
            command = click.option(*called, name, type=kind, help=text, **more)(command)
    return command


def _none_is_not_given(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> Any:
    return list(value) or None


def option_of(name: str) -> str:
    """An option's name for one as people write it, both without dashes: a field's for one of its aliases."""
    meaning = meaning_of(name) if len(name) > 1 else None
    if meaning == COUNT:
        return "images"
    return JOB_OPTIONS[meaning].option.removeprefix("--") if meaning and meaning in JOB_OPTIONS else name


def _help(entry: FieldEntry, default: Any) -> str:
    line = help_lines(Job)[entry.name]
    sentences = [line.replace("`", "")]
    if entry.choices:
        sentences.append(f"One of {', '.join(entry.choices)}.")
    if entry.is_nullable:
        sentences.append("The model's own when not given.")
    elif default not in (None, "", []) and f"`{default}`" not in line:
        value = f"{default:g}" if entry.kind is float else str(default)
        value = value.lower() if entry.kind is bool else value
        sentences.append(f"{value} when not given.")
    return " ".join(sentences)


def given_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The job fields that were given among `options`, read as in prompt files.

    Raises `click.BadParameter` for what is not JSON.
    """
    given = {
        name: value_of(JOB_OPTIONS[name], value) if JOB_OPTIONS[name].kind is str else value
        for name, value in fields_as_given(options).items()
    }
    return {name: value for name, value in given.items() if value is not NOT_GIVEN}


def fields_as_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with texts as they were given: so the first version took them."""
    given = {name: options[name] for name in JOB_OPTIONS if options.get(name) is not None}
    for name, text in given.items():
        if JOB_OPTIONS[name].kind is dict:
            given[name] = _parsed(JOB_OPTIONS[name].option, text)
    return given


def _parsed(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"it is not JSON ({error})", param_hint=option) from None
