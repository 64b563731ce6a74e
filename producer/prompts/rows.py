"""Rows and cells of CSV as RFC 4180 has it: a quote opens a cell at the cell's start and nowhere else."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence

from producer.prompts.entries import LineError, Raw
from producer.prompts.fields import meaning_of

#: Lines and characters of one row, at most: the end of a quoted cell is searched for within these.
MAX_ROW_LINES, MAX_ROW = 1_000, 64_000
#: What may part cells, and what it is called. Where two fit equally, the earlier one is taken.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def rows_of(lines: Iterator[Raw], delimiter: str) -> Iterator[Raw]:
    """(number of the first line, text) of each row that is not blank: a quoted cell may span lines.

    Where its quote is not closed within `MAX_ROW_LINES` and `MAX_ROW`, or not at the cell's end, the line
    that opens it is wrong alone: the lines that were searched for the end are rows themselves.
    """
    again: deque[Raw] = deque()
    blank = f'{delimiter}" \t\r\n'
    while True:
        first = again.popleft() if again else next(lines, None)
        if first is None:
            return
        number, text = first
        if isinstance(text, LineError):
            yield first
            continue
        if '"' not in text or not (inside := _is_open(text, delimiter)):
            if text.strip(blank):
                yield first
            continue
        seen: list[Raw] = []
        parts, size = [text], len(text)
        while inside and len(seen) < MAX_ROW_LINES and size < MAX_ROW:
            following = again.popleft() if again else next(lines, None)
            if following is None:
                break
            seen.append(following)
            if isinstance(following[1], LineError):
                break
            parts.append(following[1])
            size += len(following[1])
            inside = _is_open(following[1], delimiter, inside=True)
        if inside is False:
            yield number, "\n".join(parts)
        else:
            reason = "is not closed" if inside else "is closed before the cell ends"
            yield number, LineError("", f'A quote (") opens a cell and {reason}: double it, or close it.')
            again.extendleft(reversed(seen))


def cells_of(row: str, delimiter: str) -> list[str]:
    """The cells of a row. Raises `LineError`."""
    try:
        lines = [row] if "\n" not in row else io.StringIO(row, newline="")
        cells = next(csv.reader(lines, delimiter=delimiter, strict=True))
        return [_plain(cell) for cell in cells] if '="' in row else cells
    except (csv.Error, StopIteration) as error:
        raise LineError(
            "", f"It is not CSV ({error}): put quotes around the cell, double those in it."
        ) from None


#: A formula that is a text and nothing else.
_TEXT_FORMULA = re.compile(r'="((?:[^"]|"")*+)"')


def _plain(cell: str) -> str:
    """The text of a cell such as ="007", which a spreadsheet takes for a text."""
    found = _TEXT_FORMULA.fullmatch(cell)
    return found[1].replace('""', '"') if found else cell


def delimiter_of(heading: str, usual: str) -> str:
    """What parts the cells of a table with this heading: that by which most cells are names of job fields."""
    candidates = sorted(DELIMITERS, key=lambda each: each != usual)
    return max(candidates, key=lambda each: _known_names(heading, each))


def named_delimiter(line: str) -> str | None:
    """The delimiter that a line such as `sep=;` names, which Excel writes and reads; None for others."""
    # Saved once more by a spreadsheet, it is a cell like others.
    plain = line.strip("\ufeff \r\n").strip('"')
    name, _, delimiter = plain.partition("=")
    if name.lower() == "sep" and delimiter.strip('"')[:1] in (*DELIMITERS, "") and len(delimiter) < 10:
        return delimiter[:1] or ","
    return None


def _known_names(heading: str, delimiter: str) -> int:
    try:
        meanings = [meaning_of(name) for name in cells_of(heading, delimiter)]
    except LineError:
        return 0
    return sum(each is not None for each in meanings) if "prompt" in meanings else 0


def _is_open(text: str, delimiter: str, *, inside: bool = False) -> bool | None:
    """Whether a quoted cell is open at the end of a line, which begins `inside` one or not.

    None where it begins inside one and a cell goes on after its closing quote.
    """
    at, size, began_inside = 0, len(text), inside
    while True:
        if not inside:
            if at < size and text[at] == '"':
                at += 1
            else:
                if (at := text.find(delimiter, at)) < 0:
                    return False
                at += 1
                continue
        # The end of the cell: a quote that is not doubled.
        while (at := text.find('"', at)) >= 0 and text[at + 1 : at + 2] == '"':
            at += 2
        if at < 0:
            return True
        at += 1
        if text[at : at + 1] not in ("", delimiter):
            # A line that is a row of its own is refused when it is parted into cells.
            return None if began_inside else False
        inside = False
        if at >= size:
            return False
        at += 1


def without_empty_end(cells: Sequence[str], count: int) -> Sequence[str]:
    """The cells without empty ones beyond the first `count`, as spreadsheets write them."""
    size = len(cells)
    while size > count and not cells[size - 1].strip():
        size -= 1
    return cells[:size]
