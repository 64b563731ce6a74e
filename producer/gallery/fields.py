"""The fields of a job that the page lists, groups by and filters by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PageField:
    """One field as the page's script reads it; the row's value under `name` is text."""

    #: The field's name: in a row, and in front of a value in the filter (`seed:7`).
    name: str
    #: What people read.
    label: str
    #: Whether the filter's `name:value` means the whole value; if not, any part of it.
    exact: bool
    #: Whether the filter's words are looked for in it. Not in small numbers: "30" would find every job.
    searched: bool


#: In the order in which the page lists them. `size` is width and height, "512x768".
FIELDS = (
    PageField("prompt", "Prompt", exact=False, searched=True),
    PageField("negative_prompt", "Negative prompt", exact=False, searched=True),
    PageField("seed", "Seed", exact=True, searched=True),
    PageField("size", "Size", exact=True, searched=True),
    PageField("steps", "Steps", exact=True, searched=False),
    PageField("guidance_scale", "Guidance", exact=True, searched=False),
    PageField("scheduler", "Scheduler", exact=True, searched=True),
    PageField("model", "Model", exact=False, searched=True),
    PageField("revision", "Revision", exact=False, searched=False),
    PageField("format", "Format", exact=True, searched=False),
)


def as_json() -> list[dict[str, Any]]:
    """All fields for the page's data."""
    return [asdict(field) for field in FIELDS]
