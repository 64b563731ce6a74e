"""Usage as people and programs ask for it: the days of a period, and a table."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Sequence
from typing import Any

from worker.state.usage import Usage, day_of


def period(since: str, until: str) -> tuple[datetime.date, datetime.date]:
    """The days of two texts; where they are empty, this month until today. Raises `CallerError`."""
    today = datetime.datetime.now(datetime.UTC).date()
    last = day_of(until, "until") if until else today
    return day_of(since, "since") if since else last.replace(day=1), last


def as_csv(found: Sequence[Usage]) -> str:
    """A heading and a line for each."""
    text = io.StringIO()
    rows: list[Sequence[Any]] = [Usage._fields, *found]
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
