"""The fields of a job that the page lists, groups by and filters by, made from the table of job fields."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from worker.contract.job import JOB_FIELDS


@dataclass(frozen=True)
class PageField:
    """One field as the page's script reads it; the row's value under `name` is text."""

    #: Its name: in a row, and in front of a value in the filter (`seed:7`).
    name: str
    #: What people read.
    label: str
    #: Whether the filter's `name:value` means the whole value; if not, any part of it.
    exact: bool
    #: Whether the filter's words are looked for in it. Not in small numbers: "30" would find every job.
    searched: bool
    #: Its value in rows that do not have it; empty: there is none.
    default: str
    #: The job fields that it shows, joined by "x": width and height are one field of the page, `size`.
    job_fields: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What the page's script needs of it."""
        return {name: value for name, value in vars(self).items() if name != "job_fields"}


def text_of(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def text_of_field(name: str, value: object) -> str:
    """The value of a job field as people read it."""
    as_text = JOB_FIELDS[name].as_text
    with contextlib.suppress(ValueError):
        return text_of(value) if as_text is None else as_text(value)
    return text_of(value)


def _page_fields() -> Iterator[PageField]:
    shown = (each for each in JOB_FIELDS.values() if each.is_hashed)
    for name, group in itertools.groupby(shown, key=lambda each: each.pair or each.name):
        entries = tuple(group)
        first = entries[0]
        yield PageField(
            name,
            first.label,
            # A text that anybody may write is found by a part of it.
            exact=first.kind not in (str, list) or bool(first.choices),
            searched=first.is_searched,
            # What a later version added is shown where it is not at its default, as in the infotext.
            default="" if first.is_original else text_of_field(first.name, first.default),
            job_fields=tuple(each.name for each in entries),
        )


#: In the order in which the page lists them.
FIELDS = tuple(_page_fields())


def as_json() -> list[dict[str, Any]]:
    """All fields for the page's data."""
    return [field.as_json() for field in FIELDS]
