"""Whether the first version of smallcat read a prompt file as the present one does: then its runs go on.

The answer errs on one side: a file that is not plain counts as read otherwise, and is a run of its own.
"""

from __future__ import annotations

import json
import re
from typing import Any

#: What the first version's reading of a text and the present one may read otherwise: dashes and invisible
#: characters (all below U+2000 to U+20FF), UTF-16, and words that mean nothing; and a CR alone.
_READ_OTHERWISE = re.compile(
    rb"--|\xe2[\x80-\x83\xb8]|\xef|\xc2\xad|\xcd\x8f|\xe1|\xe3\x85|\xd8\x9c|\0|\r(?!\n)"
    rb"|(?:^|\n)\s*(?:null|none|nan|<na>)\s*(?:\r?\n|$)",
    re.IGNORECASE,
)
#: Fields whose plain values both read alike, and the form of those in tables. Schedulers and formats have
#: more names now; other columns may be another name of a field now.
_TEXTS = {"prompt", "negative_prompt", "model", "revision"}
_FORMS = dict.fromkeys(("seed", "width", "height", "steps", "priority"), re.compile(r"\d{1,18}")) | (
    dict.fromkeys(("guidance_scale", "guidance_start", "guidance_stop"), re.compile(r"\d{1,3}(?:\.\d{1,6})?"))
)
_NOTHING = re.compile(r"null|none|nan|<na>", re.IGNORECASE)


class ReadAlike:
    """Looks at a file's lines one after the other: `is_alike` until one may be read otherwise."""

    def __init__(self, file_format: str) -> None:
        self._format = file_format
        self.is_alike = file_format in ("txt", "csv", "tsv", "jsonl")
        self._delimiter = "\t" if file_format == "tsv" else ","
        self._headings: list[str] = []

    def look(self, lines: bytes) -> None:
        """Look at whole lines, with their ends."""
        if not self.is_alike:
            return
        if _READ_OTHERWISE.search(lines):
            self.is_alike = False
        elif self._format != "txt":
            try:
                # A blank line between others is none that is plain.
                each_line = lines.decode().removesuffix("\n").split("\n")
                self.is_alike = all(self._is_plain(line.removesuffix("\r")) for line in each_line)
            except (ValueError, RecursionError):  # No UTF-8, or no JSON.
                self.is_alike = False

    def _is_plain(self, line: str) -> bool:
        if self._format == "jsonl":
            value = json.loads(line)
            return _is_text(value) or (
                isinstance(value, dict) and all(_is_value(name, each) for name, each in value.items())
            )
        if '"' in line:
            return False
        if not self._headings:
            return self._is_heading(line)
        cells = line.split(self._delimiter)
        others = {",", ";", "\t"} - {self._delimiter}
        return (
            len(cells) == len(self._headings)
            and not others & set(line)
            and all(map(_is_cell, self._headings, cells))
        )

    def _is_heading(self, line: str) -> bool:
        if self._format == "csv" and "," not in line and ";" in line:
            self._delimiter = ";"
        self._headings = line.split(self._delimiter)
        known = self._headings and set(self._headings) <= _TEXTS | set(_FORMS)
        return bool(known and "prompt" in self._headings and len(set(self._headings)) == len(self._headings))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value == value.strip() and not _NOTHING.fullmatch(value)


def _is_cell(heading: str, cell: str) -> bool:
    if not cell:
        return heading != "prompt"
    return bool(_FORMS[heading].fullmatch(cell)) if heading in _FORMS else _is_text(cell)


def _is_value(name: str, value: Any) -> bool:
    """Whether a member of a JSON object is plain: a text, or a number of the field's type."""
    if name in _TEXTS:
        return _is_text(value)
    form = _FORMS.get(name)
    return form is not None and isinstance(value, int | float) and bool(form.fullmatch(str(value)))
