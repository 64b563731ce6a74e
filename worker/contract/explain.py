"""pydantic's findings about a job as sentences: the field, its value, the limit and the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.contract.limits import requirement

if TYPE_CHECKING:
    from pydantic import ValidationError

    from worker.contract.job_fields import FieldEntry


#: Whether values are shown as JSON has them: to those who have sent JSON.
in_json: Final = ContextVar("in_json", default=False)
#: Characters of a name that are compared with others.
_LONGEST = 100


def explain(error: ValidationError, table: Mapping[str, FieldEntry]) -> str:
    """One sentence for each finding, in one line. `table` has the fields there are.

    What an unknown one is near, or else the names of all: a job's `webhook` stands beside its fields.
    """
    sentences = []
    for finding in error.errors(include_url=False):
        field = str(finding["loc"][0]) if finding["loc"] else "job"
        value = finding.get("input")
        match finding["type"]:
            case "extra_forbidden":
                near = _near(field, table)
                known = ", ".join((*table, "webhook"))
                hint = f'did you mean "{near}"?' if near else f"known are {known}."
                shown = f'"{field}"' if field.isprintable() and len(field) <= 60 else short(field)
                sentences.append(f"There is no job field {shown}: {hint}")
            case "missing":
                sentences.append(f"{field} is missing: a job needs a {field}.")
            case "value_error":
                sentences.append(f"{field} {str(finding['msg']).removeprefix('Value error, ')}.")
            case "enum":
                sentences.append(f"{field} is {short(value)}: use one of {', '.join(table[field].choices)}.")
            case "string_too_short":
                is_needed = field in table and table[field].is_required
                remedy = "say what to draw" if is_needed else "leave it out for the fleet's default"
                sentences.append(f"{field} is empty: {remedy}.")
            case "string_too_long":
                limit = finding["ctx"]["max_length"]
                sentences.append(f"{field} is {len(str(value)):,} characters, the limit is {limit:,}.")
            case _:
                limit = requirement(finding, table[field].limits if field in table else "")
                sentences.append(f"{short(field)[1:-1]} is {short(value)}: it must be {limit}.")
    return " ".join(sentences)


def _near(name: str, table: Mapping[str, FieldEntry]) -> str | None:
    """The field that another program calls `name`, or whose name is like it."""
    fields = {each: each for each in table}
    names = {other: each.name for each in table.values() for other in each.all_headings} | fields
    plain = {_plain(each): field for each, field in names.items()}
    if (field := plain.get(_plain(name[:_LONGEST]))) is not None:
        return field
    for known in (fields, names):
        if near := difflib.get_close_matches(name[:_LONGEST], known, 1):
            return known[near[0]]
    return None


def _plain(name: str) -> str:
    """A name without what does not count in it."""
    return name.casefold().replace("_", "").replace("-", "").replace(" ", "")


def why_no_file(path: Path) -> str:
    """Why a path is that of no regular file, and what to do."""
    if path.is_dir():
        return "that is a folder: name a file in it"
    if path.exists():
        return "that is no regular file: copy what it holds into one"
    return "there is no such file: check its path"


def short(value: object) -> str:
    """A value as an error can show it: 60 characters at most. As Python has it, unless `in_json`."""
    is_json = in_json.get() and not isinstance(value, str)
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr) if is_json else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists without end
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
