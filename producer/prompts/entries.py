"""What a prompt file is made of: lines that are prompts, and lines that are not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias


class LineError(Exception):
    """Raised when a line is no prompt. `field` is the wrong job field, or ""; `reason` says what to do."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt of a file, as it was read: not yet checked, and its dynamic prompts not yet expanded."""

    #: Number of the line where it starts, from 1; in Parquet of the row.
    line: int
    #: Job fields, as far as the file gives them. A seed of -1 is one that is to be drawn.
    fields: dict[str, Any]
    #: Number of pictures that the line itself asks for.
    images: int = 1
    #: Lines that it takes, >= 1: a quoted cell may have several.
    lines: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True)
class BadEntry:
    """One line that is no prompt."""

    #: As for `Entry`.
    line: int
    #: The field that is wrong; "" where it is the line itself.
    field: str
    #: What is wrong, and what to do.
    reason: str
    #: As for `Entry`. The dataclass's own `field` is hidden here by the name above.
    lines: int = 1


#: A line before it is parsed: its number, and its text or values, or a `LineError`.
Raw: TypeAlias = tuple[int, Any]
