"""What a job asks for, in lines for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.contract.job import JOB_FIELDS

if TYPE_CHECKING:
    from worker.contract.job import Job


def lines_of(job: Job, *, without: tuple[str, ...] = ()) -> list[str]:
    """A line for each field that came after the first version, where it is not at its default.

    `without`: those that are shown elsewhere. What the fleet fills in and whose job it is are left out.
    """
    shown = []
    for entry in JOB_FIELDS.values():
        value = getattr(job, entry.name)
        is_own = not (entry.is_original or entry.is_filled_by_fleet or entry.is_set_by_producer)
        if is_own and entry.name not in without and value != entry.default:
            text = value if entry.as_text is None else entry.as_text(value)
            shown.append(f"{entry.name:10} {text}")
    return shown
