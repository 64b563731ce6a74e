"""Prompt files: many prompts to submit, a line or a row each, in one of five formats.

    txt           a prompt a line, which may have options (`producer.prompts.a1111_options`); blank lines and
                  lines that start with # are skipped
    csv, tsv      the first line has the headings; rows without a value are skipped (`producer.prompts.rows`)
    jsonl         a JSON object of job fields a line, or a JSON string: a prompt
    parquet       a row a prompt, columns as headings; needs pyarrow

What names and values mean is the same in all of them: `producer.prompts.fields`.
Text is UTF-8, with or without BOM, or UTF-16 with BOM; lines end with LF, CRLF or CR. Files are streamed: one
line is in memory. A line that is wrong is reported with its number, and reading goes on with the next one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, TypeAlias

from producer.prompts.a1111_options import has_options, options_of
from producer.prompts.entries import BadEntry, Entry, LineError, Raw
from producer.prompts.fields import COUNT, SCHEDULE, SIZE, FieldReader, meaning_of, misspelt, near_miss
from producer.prompts.lines import lines_of, refuse_bad_bytes
from producer.prompts.parquet import ParquetTable
from producer.prompts.pasted import refuse_parameters
from producer.prompts.rows import (
    DELIMITERS,
    cells_of,
    delimiter_of,
    named_delimiter,
    rows_of,
    without_empty_end,
)
from producer.prompts.sources import Source
from worker.contract.csv_cells import plain
from worker.contract.errors import PromptFileError

__all__ = ["READING", "BadEntry", "Entry", "LineError", "read"]

#: The version of this reading. One that reads a line otherwise takes a new number: runs go on as they began.
READING = 2

#: Makes a line's entry of its number and text or values. Raises `LineError`.
Parse: TypeAlias = Callable[[int, Any], Entry]
#: Prompts that are words for nothing have as many characters, at most.
_SHORT = 6
#: How the columns of a manifest of ours begin, whose cells begin no formula.
_MANIFEST = ("file", "line", "id", "state", "uri", "path", "seed", "prompt")
#: How a line of an array over several lines begins or ends, and what to do.
_OF_ARRAYS = "A file that is one array becomes such lines by: jq -c '.[]' FILE"
_ARRAY = re.compile(r"^\s*[\[{]\s*$|^\s*\[|,\s*$|^\s*[\]}]\s*$")
#: Digits of a number in JSON, at most.
_MAX_DIGITS = 1_000


@dataclass(frozen=True)
class _File:
    """A file that is read, and how."""

    source: Source
    stream: BinaryIO
    warn: Callable[[str], None]
    extra: bool

    def fields(self, *, decimal_comma: bool = False, is_json: bool = False) -> FieldReader:
        """The reader of its names and values."""
        return FieldReader(
            self.source.name, self.warn, extra=self.extra, decimal_comma=decimal_comma, is_json=is_json
        )


def read(
    source: Source, skip: int = 0, warn: Callable[[str], None] = lambda _: None, *, extra: bool = False
) -> Iterator[Entry | BadEntry]:
    """The entries of a prompt file in order, without the first `skip`, which are not parsed.

    `warn` is called with one sentence for each choice that is made for the user, and for each name that has
    no meaning here. `extra` permits names that are nearly a job field's, which go to metadata. Raises
    `PromptFileError` where the whole file cannot be read.
    """
    with source.open() as stream:
        raws, parse = _READERS[source.format](_File(source, stream, warn, extra))
        for line, raw in itertools.islice(raws, skip, None):
            try:
                if isinstance(raw, LineError):
                    raise raw
                yield parse(line, raw)
            except LineError as error:
                lines = raw.count("\n") + 1 if isinstance(raw, str) else 1
                reason = (
                    error.reason if lines == 1 else f"{error.reason} (Lines {line} to {line + lines - 1}.)"
                )
                yield BadEntry(line, error.field, reason, lines)


def _txt(file: _File) -> tuple[Iterator[Raw], Parse]:
    fields = file.fields()

    def parse(line: int, text: str) -> Entry:
        refuse_bad_bytes(text)
        if len(text) > _SHORT and not has_options(text):
            refuse_parameters(text)
            return Entry(line, {"prompt": text})
        return Entry(line, *fields.read(line, options_of(text, extra=file.extra)))

    def raws() -> Iterator[Raw]:
        for line, text in lines_of(file.source.name, file.stream):
            if isinstance(text, LineError):
                yield line, text
            elif (stripped := text.strip()) and not stripped.startswith("#"):
                yield line, stripped

    return raws(), parse


def _jsonl(file: _File) -> tuple[Iterator[Raw], Parse]:
    fields = file.fields(is_json=True)

    def parse(line: int, text: str) -> Entry:
        refuse_bad_bytes(text)
        try:
            value = _DECODE(text)
        except (ValueError, RecursionError) as error:
            hint = f" {_OF_ARRAYS}" if _ARRAY.search(text) else ""
            raise LineError("", f"It is not JSON ({error}): write one object a line.{hint}") from None
        if isinstance(value, str):
            return Entry(line, *fields.read(line, [("prompt", value)]))
        if not isinstance(value, dict):
            kind = {list: "array", bool: "boolean", type(None): "null"}.get(type(value), "number")
            raise LineError("", f"It is a JSON {kind}: write an object of job fields, or a string.")
        return Entry(line, *fields.read(line, value.items()))

    def raws() -> Iterator[Raw]:
        for line, text in lines_of(file.source.name, file.stream):
            if isinstance(text, LineError) or text.strip():
                yield line, text

    return raws(), parse


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises `ValueError` for a key that stands twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'the key "{key[:60]}" stands twice')
        found[key] = value
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text):,} digits, the limit is {_MAX_DIGITS}")
    return int(text)


def _not_given(constant: str) -> None:
    """NaN is no value; an infinite number is refused."""
    if constant != "NaN":
        raise ValueError(f"{constant} is no number")


_DECODE = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_not_given, parse_int=_integer).decode


def _table(file: _File) -> tuple[Iterator[Raw], Parse]:
    name = file.source.name
    usual = "\t" if file.source.format == "tsv" else ","
    lines = lines_of(name, file.stream)
    first = next((each for each in lines if isinstance(each[1], LineError) or each[1].strip()), None)
    delimiter = None
    if first is not None and isinstance(first[1], str) and (delimiter := named_delimiter(first[1])):
        first = next((each for each in lines if isinstance(each[1], LineError) or each[1].strip()), None)
    if first is None:
        raise PromptFileError(f"{name} is empty: its first line must have the headings.")
    if delimiter is None and isinstance(first[1], str):
        delimiter = delimiter_of(first[1], usual)
        if delimiter != usual:
            file.warn(f"{name}: {DELIMITERS[delimiter]} part its cells.")
    rows = rows_of(itertools.chain([first], lines), delimiter or usual)
    number, heading = next(rows, (first[0], ""))
    try:
        if isinstance(heading, LineError):
            raise heading
        refuse_bad_bytes(heading)
        names = _headings(file, cells_of(heading, delimiter or usual))
    except LineError as error:
        raise PromptFileError(f"{name}, line {number}: {error.reason}") from None
    fields = file.fields(decimal_comma=delimiter == ";")
    is_manifest = tuple(names[: len(_MANIFEST)]) == _MANIFEST

    def parse(line: int, text: str) -> Entry:
        refuse_bad_bytes(text)
        cells = without_empty_end(cells_of(text, delimiter or usual), len(names))
        if is_manifest:
            cells = [plain(cell) for cell in cells]
        if len(cells) > len(names):
            reason = f"It has {len(cells)} cells for {len(names)} headings: put quotes around cells."
            raise LineError("", reason)
        found, images = fields.read(line, zip(names, cells, strict=False))
        return Entry(line, found, images, text.count("\n") + 1)

    return rows, parse


def _headings(file: _File, names: Sequence[str]) -> list[str]:
    """The names of a table's columns. Raises `PromptFileError` for those that cannot be read."""
    named = [name.strip("\ufeff \t\r\n") or f"column {number}" for number, name in enumerate(names, 1)]
    shown = ", ".join(f'"{name[:60]}"' for name in named[:20])
    meanings = [meaning_of(name) for name in named]

    def refuse(reason: str) -> NoReturn:
        raise PromptFileError(f"{file.source.name} {reason}")

    if "prompt" not in meanings:
        near = next((name for name in named if meaning_of(near_miss(name) or "") == "prompt"), None)
        hint = f'rename "{near[:60]}" to "prompt".' if near else 'rename one of them to "prompt".'
        if not near:
            hint += " Where this line is a prompt and no heading, put a line with headings above it."
        refuse(f"has no column of prompts among {shown}: {hint}")
    for name, meaning in zip(named, meanings, strict=True):
        if meaning is None and not file.extra and (near := near_miss(name)):
            refuse(f"has a column that is misspelt. {misspelt(name, near)}")
    plain = ["".join(name.casefold().replace("_", " ").replace("-", " ").split()) for name in named]
    for name, meaning in zip(plain, meanings, strict=True):
        if meaning not in (None, COUNT, SCHEDULE, SIZE) and plain.count(name) > 1:
            refuse(f"has two columns for {meaning} among {shown}: rename one.")
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        refuse(f'has two columns "{twice[:60]}" among {shown}: rename one.')
    return named


def _parquet(file: _File) -> tuple[Iterator[Raw], Parse]:
    table = ParquetTable(file.source.name, file.stream)
    names = _headings(file, table.names)
    fields = file.fields()

    def parse(line: int, row: tuple[Any, ...]) -> Entry:
        found, images = fields.read(line, zip(names, row, strict=True))
        return Entry(line, found, images)

    return table.rows(), parse


_READERS: dict[str, Callable[[_File], tuple[Iterator[Raw], Parse]]] = {
    "txt": _txt,
    "csv": _table,
    "tsv": _table,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
